#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: `target_modules` that name the matrices of Mixtral's experts (w1, w2, w3), as with
# transformers 4, are turned into `target_parameters`, and then any `lora_dropout` raises ValueError about a ParamWrapper
# that the config does not name. Without dropout the same config trains, w1 and w3 together at twice the rank.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 peft==0.21.2 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import peft
import transformers

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
sizes |= dict(num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)


def outcome(dropout):
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    config = peft.LoraConfig(r=2, target_modules=["w1", "w2", "w3"], lora_dropout=dropout)
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        return str(error)
    shapes = sorted(tuple(value.shape) for name, value in adapted.named_parameters() if "lora_A" in name)
    return sorted(adapted.peft_config["default"].target_parameters), shapes


seen = {dropout: outcome(dropout) for dropout in (0.0, 0.1)}
print("peft", peft.__version__, "transformers", transformers.__version__, seen)
# Of two experts at r=2: down_proj has 2 * 2 rows, gate_up_proj 2 * 4.
assert seen[0.0] == (["down_proj", "gate_up_proj"], [(4, 24), (8, 16)])
assert seen[0.1] == "lora.ParamWrapper does not work with lora_dropout != 0."
PYTHON
