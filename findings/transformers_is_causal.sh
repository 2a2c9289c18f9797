#!/usr/bin/env bash
# transformers 5.24.0: `is_causal` in config.json, which LlamaConfig does not list, decides whether a Llama looks ahead.
# Seen, for the first position's logits when only the last token changes, and for greedy texts with and without cache:
#   absent or true: no change, equal texts. false: another value, other texts.
#   null: no change and equal texts with sdpa attention, but with eager attention as false.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import json
import pathlib

import torch
import transformers

torch.manual_seed(0)
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.5)
transformers.LlamaForCausalLM(config).save_pretrained("model")
file = pathlib.Path("model/config.json")
plain = json.loads(file.read_text())
one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 9]])


def looks_ahead(attention):
    """Whether the first position depends on the last token, and whether a cache changes the text."""
    model = transformers.AutoModelForCausalLM.from_pretrained("model", attn_implementation=attention).eval()
    with torch.no_grad():
        first = [model(tokens).logits[0, 0] for tokens in (one, other)]
    fixed = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    texts = [model.generate(one, use_cache=cached, **fixed).tolist() for cached in (True, False)]
    return bool((first[0] - first[1]).abs().max() > 0.1), texts[0] != texts[1]


print("transformers", transformers.__version__, "lists is_causal:", hasattr(transformers.LlamaConfig(), "is_causal"))
seen = {}
for name, setting in {"absent": {}, **{json.dumps(v): {"is_causal": v} for v in (True, False, None)}}.items():
    file.write_text(json.dumps(plain | setting))
    for attention in ("sdpa", "eager"):
        seen[name, attention] = looks_ahead(attention)
        print(f"is_causal {name}, {attention}: looks ahead, cache changes the text: {seen[name, attention]}")
ahead = {("false", "sdpa"), ("false", "eager"), ("null", "eager")}
assert seen == {case: (case in ahead, case in ahead) for case in seen}, "is_causal counts otherwise now"
PYTHON
