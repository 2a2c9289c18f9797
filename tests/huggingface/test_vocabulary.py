"""Adapters that were trained after tokens had been added; PEFT and transformers, live, say what they compute."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny_models import LENGTH, VOCAB, load, logits, random_tokens, tiny_folder, torch_logits

from lora_dpo_jax.huggingface.adapters import load_adapter, read_adapter_config, save_adapter
from lora_dpo_jax.huggingface.vocabulary import Enlargement, read_enlargement
from lora_dpo_jax.huggingface.weights import load_model, read_config, save_merged
from lora_dpo_jax.main import generate
from lora_dpo_jax.models import ComputeConfig

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROWS = VOCAB + 4
TOKENS = np.concatenate([random_tokens(2, LENGTH - 4), np.arange(VOCAB, ROWS)[None].repeat(2, 0)], axis=1)


def resized(architecture: str):
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder(architecture), dtype="float32").eval()
    base.resize_token_embeddings(ROWS, mean_resizing=False)
    return base


def saved_by_peft(folder: Path, architecture: str, **settings) -> peft.PeftModel:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(resized(architecture), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, save_embedding_layers=True)
    return model


def model_of(architecture: str, enlargement: Enlargement):
    base = tiny_folder(architecture)
    config = enlargement.config(read_config(base))
    return load_model(base, config, dtype="float32", compute=ComputeConfig(attention="dense"), enlargement=enlargement)


ADDED = [VOCAB + 2, VOCAB]  # tokens whose rows were trained after they had been added
CASES = {
    "untied": ("llama2", {}),
    "tied": ("smollm2", {}),
    "rows, untied": ("llama2", dict(trainable_token_indices={"embed_tokens": ADDED, "lm_head": ADDED})),
    "rows, tied": ("smollm2", dict(trainable_token_indices=ADDED)),
}


@pytest.mark.parametrize("case", CASES)
def test_added_tokens_come_with_the_adapter(case, tmp_path):
    """In the model, in the merged one and in the adapter that is written again; of a tied model too."""
    architecture, settings = CASES[case]
    base = tiny_folder(architecture)
    theirs = torch_logits(saved_by_peft(tmp_path / "theirs", architecture, **settings), TOKENS)
    enlargement = read_enlargement(tmp_path / "theirs", base, read_config(base))
    ours = load_adapter(model_of(architecture, enlargement), tmp_path / "theirs")
    np.testing.assert_allclose(logits(ours, TOKENS), theirs, rtol=0, atol=1e-4)

    save_merged(ours, base, tmp_path / "merged", enlargement=enlargement)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(merged, TOKENS), theirs, rtol=0, atol=1e-4)

    config = read_adapter_config(tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours", base_model="base", config=config, enlargement=enlargement)
    again = peft.PeftModel.from_pretrained(resized(architecture), tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logits(again, TOKENS), theirs, rtol=0, atol=1e-4)


def test_an_enlarged_vocabulary_is_not_shared_with_other_adapters(tmp_path):
    saved_by_peft(tmp_path, "llama2")
    adapters: dict[str, str | None] = {"before": None, "after": str(tmp_path)}
    with pytest.raises(ValueError, match=r"adapters\.after brings the rows of an enlarged vocabulary, .* set it alone"):
        generate.main(generate.GenerateConfig(model=str(tiny_folder("llama2")), adapters=adapters, prompts=["Hi"]))


def test_a_base_stays_as_it_is_without_enlarged_matrices(tmp_path):
    base = tiny_folder("llama2")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    peft.get_peft_model(plain, config).save_pretrained(tmp_path, save_embedding_layers=True)
    enlargement = read_enlargement(tmp_path, base, read_config(base))
    assert not enlargement and enlargement.config(read_config(base)) == read_config(base)
    assert load(base).config == read_config(base)


def test_matrices_that_do_not_begin_with_the_bases_rows_are_refused(tmp_path):
    base = tiny_folder("llama2")
    saved_by_peft(tmp_path, "llama2")
    key = "base_model.model.model.embed_tokens.weight"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors | {key: tensors[key] + 1}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"the first rows of {key} are not the base's"):
        read_enlargement(tmp_path, base, read_config(base))
    save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"needs embed_tokens and lm_head of one size; it holds .*\(108, 32\)"):
        read_enlargement(tmp_path, base, read_config(base))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"modules_to_save": ["lm_head"]}))
    assert not read_enlargement(tmp_path, base, read_config(base))
