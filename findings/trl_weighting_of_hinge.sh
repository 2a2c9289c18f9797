#!/usr/bin/env bash
# trl 1.16.0, torch 2.13.0: `use_weighting=True` (WPO) trains with `loss_type="sigmoid"` and raises RuntimeError with
# "hinge": the weights are multiplied in place into the result of relu, which its gradient needs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import datasets
import tokenizers
import transformers
import trl

words = {word: index for index, word in enumerate(["<unk>", "</s>", "one", "two", "three", "four"])}
backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
)
sizes = dict(vocab_size=6, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, eos_token_id=1)).save_pretrained(
    "model"
)
rows = datasets.Dataset.from_list([{"prompt": "one two", "chosen": " three", "rejected": " four"}] * 2)


def outcome(loss_type):
    model = transformers.AutoModelForCausalLM.from_pretrained("model")
    settings = trl.DPOConfig(
        output_dir="out", loss_type=[loss_type], use_weighting=True, max_steps=1, report_to=[], use_cpu=True, bf16=False
    )
    trainer = trl.DPOTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    try:
        trainer.train()
    except RuntimeError as error:
        return "inplace operation" in str(error) and "RuntimeError: in-place"
    return "trained"


seen = {loss_type: outcome(loss_type) for loss_type in ("sigmoid", "hinge")}
print("trl", trl.__version__, seen)
assert seen == {"sigmoid": "trained", "hinge": "RuntimeError: in-place"}
PYTHON
