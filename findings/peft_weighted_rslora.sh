#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0: `add_weighted_adapter` of one rank-stabilized adapter with weight 1 gives another adapter: its
# term is sqrt(r) times as strong. The new config keeps `use_rslora` and takes lora_alpha = r, as if scaling were alpha / r.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 peft==0.21.2 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import peft
import torch

RANK = 4


def strength(use_rslora):
    """How many times as strong the combination is as the one adapter that it is made of."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8))
    config = peft.LoraConfig(
        r=RANK, lora_alpha=8, target_modules=["0"], use_rslora=use_rslora, init_lora_weights=False
    )
    model = peft.get_peft_model(layer, config, adapter_name="one")
    model.add_weighted_adapter(["one"], [1.0], "same", combination_type="linear")
    adapted = model.base_model.model[0]
    one, same = (adapted.get_delta_weight(name) for name in ("one", "same"))
    return round((same.norm() / one.norm()).item(), 4)


found = {"alpha / r": strength(False), "alpha / sqrt(r)": strength(True)}
print("peft", peft.__version__, found)
assert found == {"alpha / r": 1.0, "alpha / sqrt(r)": RANK**0.5}, found
PYTHON
