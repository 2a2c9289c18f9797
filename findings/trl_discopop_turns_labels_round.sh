#!/usr/bin/env bash
# trl 1.16.0, torch 2.13.0: DPOTrainer with `loss_type="discopop"` and its default `discopop_tau=0.05` learns the opposite
# of the labels where policy and reference start equal: the gradient of the loss at a margin of 0 has the wrong sign, for
# every beta. "sigmoid" on the same pairs, and discopop with a tau above 0.1023, follow the labels.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import datasets
import tokenizers
import torch
import transformers
import trl

words = {word: index for index, word in enumerate(["<unk>", "</s>", "one", "two", "three", "four"])}
backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
)
torch.manual_seed(0)
sizes = dict(vocab_size=6, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, eos_token_id=1)).save_pretrained(
    "model"
)
rows = datasets.Dataset.from_list([{"prompt": "one two", "chosen": " three", "rejected": " four"}] * 4)


def margin_after_training(**settings):
    model = transformers.AutoModelForCausalLM.from_pretrained("model")
    arguments = trl.DPOConfig(
        output_dir="out", max_steps=40, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, **settings
    )
    trainer = trl.DPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return [line["rewards/margins"] for line in trainer.state.log_history if "rewards/margins" in line][-1]


seen = {
    "sigmoid": margin_after_training(loss_type=["sigmoid"]),
    "discopop": margin_after_training(loss_type=["discopop"]),
    "discopop, tau 0.5": margin_after_training(loss_type=["discopop"], discopop_tau=0.5),
}
print("trl", trl.__version__, {name: round(margin, 4) for name, margin in seen.items()})
assert seen["sigmoid"] > 0 and seen["discopop, tau 0.5"] > 0
assert seen["discopop"] < 0
PYTHON
