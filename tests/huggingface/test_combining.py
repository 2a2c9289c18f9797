"""Several adapters as one; PEFT, live, says what it computes."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tiny_models import LENGTH, load, logits, random_tokens, tiny_folder, torch_logits

from lora_dpo_jax.huggingface.adapters import load_adapter
from lora_dpo_jax.huggingface.combining import combine_adapters
from lora_dpo_jax.main.combine import CombineConfig, main

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = random_tokens(2, LENGTH)
BASE = "llama2"


def base():
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_folder(BASE), dtype="float32").eval()


def saved(folder: Path, seed: int, **settings) -> Path:
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(base(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def two(tmp_path) -> list[Path]:
    one = saved(tmp_path / "one", 0, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return [one, saved(tmp_path / "two", 1, r=4, lora_alpha=3, target_modules=["v_proj", "up_proj"])]


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, -0.5]])
@pytest.mark.parametrize("combination", ["cat", "linear"])
def test_it_is_what_peft_makes(combination, weights, two, tmp_path):
    theirs = peft.PeftModel.from_pretrained(base(), two[0], adapter_name="one")
    theirs.load_adapter(two[1], adapter_name="two")
    theirs.add_weighted_adapter(["one", "two"], weights, "both", combination_type=combination)
    theirs.set_adapter("both")
    names = [str(folder) for folder in two]
    main(CombineConfig(adapters=names, weights=weights, combination=combination, output=str(tmp_path / "both")))
    ours = load_adapter(load(tiny_folder(BASE)), tmp_path / "both")
    np.testing.assert_allclose(logits(ours, TOKENS), torch_logits(theirs.eval(), TOKENS), rtol=0, atol=1e-4)
    in_peft = peft.PeftModel.from_pretrained(base(), tmp_path / "both").eval()
    np.testing.assert_allclose(logits(ours, TOKENS), torch_logits(in_peft, TOKENS), rtol=0, atol=1e-4)


def test_cat_adds_what_each_adds_whatever_their_ranks_and_scalings(tmp_path):
    pattern = dict(rank_pattern={"1.self_attn.q_proj": 3}, alpha_pattern={"2.self_attn.q_proj": 32})
    folders = [
        saved(tmp_path / "a", 0, r=2, use_rslora=True, target_modules=["q_proj"], **pattern),
        saved(tmp_path / "b", 1, r=5, lora_alpha=10, target_modules=["q_proj"]),
    ]
    combine_adapters(folders, [2.0, -1.0], tmp_path / "both")
    written = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (8, 8, False)
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (*folders, tmp_path / "both")]
    for number, (rank, alpha) in enumerate([(2, 8), (3, 8), (2, 32)]):
        key = f"base_model.model.model.layers.{number}.self_attn.q_proj.lora_"
        one, two, both = (t[f"{key}B.weight"] @ t[f"{key}A.weight"] for t in tensors)
        np.testing.assert_allclose(both, 2 * alpha / rank**0.5 * one - 2 * two, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_combined_says_why(two, tmp_path):
    other = saved(tmp_path / "other", 2, r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"linear adds factors of one rank, and the adapters have \[4, 2\]; set cat"):
        combine_adapters([two[0], other], [1.0, 1.0], tmp_path / "x", combination="linear")
    dora = saved(tmp_path / "dora", 2, r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ValueError, match="dora: use_dora=True: magnitudes of DoRA cannot be added"):
        combine_adapters([two[0], dora], [1.0, 1.0], tmp_path / "x")
    rows = saved(tmp_path / "rows", 2, r=2, target_modules=["q_proj"], trainable_token_indices=[3])
    with pytest.raises(ValueError, match=r"rows: trainable_token_indices=\[3\]: rows of the embedding cannot be added"):
        combine_adapters([two[0], rows], [1.0, 1.0], tmp_path / "x")
    settings = json.loads((other / "adapter_config.json").read_text())
    of_experts = settings | {"target_parameters": ["mlp.experts.down_proj"]}
    (other / "adapter_config.json").write_text(json.dumps(of_experts))
    with pytest.raises(ValueError, match=r"other: target_parameters=.* of parameters are not combined"):
        combine_adapters([two[0], other], [1.0, 1.0], tmp_path / "x")
    (other / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "org/other"}))
    with pytest.raises(ValueError, match="different bases: .*org/other"):
        combine_adapters([two[0], other], [1.0, 1.0], tmp_path / "x")
    with pytest.raises(ValueError, match=r"weights=\[1.0\] must have one number for each of 2 adapters"):
        CombineConfig(adapters=["a", "b"], weights=[1.0], output="out")
    assert not (tmp_path / "x").exists()
