#!/usr/bin/env bash
# peft 0.21.2, transformers 5.24.0: a Qwen3-MoE may have dense layers too (mlp_only_layers), whose MLPs have modules called
# gate_proj, up_proj and down_proj. With these as target_modules, PEFT adapts the experts, which are parameters, and no
# module of a dense layer. The only warning is of a rank_pattern that the user did not give.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 peft==0.21.2 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import warnings

import peft
import torch
import transformers

torch.manual_seed(0)
config = transformers.Qwen3MoeConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    mlp_only_layers=[0],
)
transformers.Qwen3MoeForCausalLM(config).save_pretrained("model")


def base():
    return transformers.Qwen3MoeForCausalLM.from_pretrained("model").eval()


targets = ["gate_proj", "up_proj", "down_proj", "q_proj"]
modules = [name for name, _ in base().named_modules() if name.endswith(tuple(targets))]
dense = [name for name in modules if ".mlp." in name]
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    model = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=targets))
adapted = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in model.state_dict() if ".lora_A" in name}
print("peft", peft.__version__, "| modules of these names:", dense, "| adapted:", sorted(adapted))
print("warned of:", [str(warning.message).partition(":")[0] for warning in told if "pattern" in str(warning.message)])
assert dense == [f"model.layers.0.mlp.{name}" for name in targets[:3]]
assert not adapted & set(dense) and "model.layers.0.self_attn.q_proj" in adapted
assert any(name.startswith("model.layers.1.mlp.experts") for name in adapted)
assert not any("mlp_only" in str(warning.message) or "dense" in str(warning.message) for warning in told)
PYTHON
