import importlib
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from tiny_models import (
    ARCHITECTURES,
    LENGTH,
    LLAMA3_ROPE,
    in_the_words_of_transformers_4,
    load,
    logits,
    random_tokens,
    tiny_folder,
    torch_logits,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lora_dpo_jax.huggingface.weights import read_config
from lora_dpo_jax.models import config_from_hf
from lora_dpo_jax.models.architectures import ARCHITECTURES as ROWS
from lora_dpo_jax.models.config_json import HARMLESS, HARMLESS_KINDS, used_keys


def assert_logits_match(folder, tokens):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ours = logits(load(folder, attention="auto"), tokens)
    np.testing.assert_allclose(ours, torch_logits(theirs, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_match_transformers(architecture):
    assert_logits_match(tiny_folder(architecture), random_tokens(2, LENGTH))


def test_logits_match_transformers_for_a_config_of_transformers_4(tmp_path):
    folder = in_the_words_of_transformers_4(tiny_folder("llama3.1"), tmp_path / "model")
    assert_logits_match(folder, random_tokens(2, LENGTH))


def test_dynamic_rope_within_the_original_length_is_no_stretch():
    assert_logits_match(tiny_folder("llama_dynamic_rope"), random_tokens(1, 12))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_dialects_of_config_json_say_the_same(architecture, tmp_path):
    older = in_the_words_of_transformers_4(tiny_folder(architecture), tmp_path / "model")
    assert read_config(older) == read_config(tiny_folder(architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_config_that_leaves_out_what_is_default_says_the_same(architecture):
    config = ARCHITECTURES[architecture]
    short = json.loads(json.dumps(config.to_diff_dict()))
    assert config_from_hf(short) == config_from_hf(json.loads(config.to_json_string(use_diff=False)))


LLAMA = json.loads(ARCHITECTURES["llama2"].to_json_string(use_diff=False))
LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 16}
LONGROPE |= {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
ROPES: dict[str, dict[str, Any]] = {
    "rope_scaling replaces rope_parameters": {
        "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 100.0},
        "rope_scaling": {**LINEAR, "rope_theta": 700.0},
        "rope_theta": 300.0,
    },
    "its theta may stand at the top level": {
        "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 100.0},
        "rope_scaling": LINEAR,
        "rope_theta": 300.0,
    },
    "its theta is 10,000, not that of the one it replaces": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "rope_scaling": LINEAR,
    },
    "an empty rope_scaling replaces nothing": {"rope_parameters": {**LINEAR, "rope_theta": 100.0}, "rope_scaling": {}},
    "a theta within counts before the top level's": {
        "rope_parameters": {**LINEAR, "rope_theta": 100.0},
        "rope_theta": 300.0,
    },
    "a top-level original length counts before the nested one": {
        "rope_parameters": LLAMA3_ROPE,
        "original_max_position_embeddings": 4,
    },
    "an original length that is nowhere is max_position_embeddings": {
        "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"},
        "max_position_embeddings": 20,
    },
    "default with a factor": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "factor": 4.0}},
    "default with all that other types have": {
        "rope_scaling": {**LLAMA3_ROPE, "rope_type": "default", "attention_factor": 2.0, "beta_fast": 32, "mscale": 0.7}
    },
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "yarn with all that it may have": {
        "rope_parameters": YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.5}
    },
    "yarn with two scales of its logarithm": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}},
    "yarn whose factor is that of its lengths": {"rope_parameters": YARN | {"factor": None}},
    "longrope": {"rope_parameters": LONGROPE},
    "longrope with a factor": {"rope_parameters": LONGROPE | {"factor": 3.0}},
    "all dimensions are turned": {
        "rope_parameters": {**LINEAR, "rope_theta": 100.0, "partial_rotary_factor": 1.0},
        "partial_rotary_factor": 1.0,
    },
}


def with_config(architecture: str, folder: Path, changes: dict[str, Any]) -> Path:
    """The tiny model with another config.json."""
    shutil.copytree(tiny_folder(architecture), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("case", ROPES)
def test_rotary_settings_are_read_as_transformers_reads_them(case, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | ROPES[case]))
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
    ours, plain = (config_from_hf(config) for config in (LLAMA | ROPES[case], LLAMA))
    frequencies = [config.rope.inverse_frequencies(config.head_dim, jnp.int32(1)) for config in (ours, plain)]
    np.testing.assert_allclose(frequencies[0], theirs.inv_freq.numpy(), rtol=1e-6)
    assert np.abs(frequencies[0] - frequencies[1]).max() > 1e-3  # the case is one
    assert ours.rope.magnitude == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("case", ["rope_scaling replaces rope_parameters", "default with a factor"])
def test_logits_match_transformers_whatever_says_the_rotary_settings(case, tmp_path):
    assert_logits_match(with_config("llama2", tmp_path / "model", ROPES[case]), random_tokens(1, LENGTH))


# Keys that are refused unless they are off, and keys of the images that a module reads as well.
FOR_OTHERS = {"use_bidirectional_attention", "attn_logit_softcapping", "clip_qkv"}
FOR_OTHERS |= {"vision_config", "text_config", "get_text_config", "mm_tokens_per_image"}


@pytest.mark.parametrize("model_type", ROWS)
def test_all_that_the_model_of_transformers_reads_is_used_or_changes_no_logit(model_type):
    folder = model_type.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    source = inspect.getsource(module)
    read = {*re.findall(r"config\.([a-z]\w+)", source), *re.findall(r"attr\([\w.]*config, \"(\w+)\"", source)}
    assert {"hidden_size", "rope_parameters", "head_dim"} <= read
    known = used_keys(ROWS[model_type]) | HARMLESS | FOR_OTHERS
    assert {key for key in read if key not in known and not HARMLESS_KINDS.fullmatch(key)} == set()


NOTES_OF_OTHERS = {
    "unsloth_fixed": True,
    "unsloth_version": "2026.1",
    "tokenizer_class": "LlamaTokenizer",
    "torchscript": True,
    "gradient_checkpointing": True,
    "keys_to_ignore_at_inference": ["past_key_values"],
    "model_max_length": 4096,
    "num_labels": 3,
    "neftune_noise_alpha": 5.0,
    "temperature": 0.6,
    "max_length": 20,
    "repetition_penalty": 1.1,
    "auto_map": {"AutoModelForCausalLM": "modeling_mine.MyModel"},
    "trained_by": {"name": "someone"},
}


def test_keys_that_no_model_reads_are_ignored_and_named_in_the_log_once(tmp_path, caplog):
    folder = with_config("llama2", tmp_path / "model", NOTES_OF_OTHERS)
    for _ in range(2):
        assert read_config(folder) == read_config(tiny_folder("llama2"))
    (message,) = [record.message for record in caplog.records if str(folder) in record.message]
    assert all(key in message for key in NOTES_OF_OTHERS)


def test_what_transformers_writes_is_not_worth_a_word(tmp_path, caplog):
    for architecture in ARCHITECTURES:
        read_config(in_the_words_of_transformers_4(tiny_folder(architecture), tmp_path / architecture))
    assert not [record for record in caplog.records if record.name.startswith("lora_dpo_jax")]


def test_every_generation_setting_is_ignored():
    config = json.loads(ARCHITECTURES["qwen3"].to_json_string(use_diff=False))
    settings = dict.fromkeys(transformers.GenerationConfig().to_dict(), 1)
    assert config_from_hf({**settings, **config}) == config_from_hf(config)


@pytest.mark.parametrize(
    "feature",
    [
        {"attn_logit_softcapping": 50.0},
        {"logit_scale": 0.5},
        {"clip_qkv": 8.0},
        {"embedding_multiplier": 12.0},
        {"residual_multiplier": 0.2},
        {"num_experts": 8},
        {"use_qk_norm": True},
        {"is_causal": False},
        {"is_causal": None},
        {"use_bidirectional_attention": True},
        {"per_layer_config": {"0": {"hidden_size": 8}}},
        {"transformers_weights": "other.safetensors"},
        {"quantization_config": {"quant_method": "gptq"}},
        {"quantization": {"group_size": 64, "bits": 4}},
        {"hidden_act": "relu2"},
        {"model_type": "gpt2"},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 4.0}},
        {"rope_scaling": {"type": "longrope", "short_factor": 1.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ],
    ids=str,
)
def test_features_that_are_not_supported_are_errors_that_name_them(feature):
    ((key, value),) = feature.items()
    with pytest.raises(ValueError, match="config.json: ") as error:
        config_from_hf(LLAMA | feature)
    assert key in str(error.value)
    named = [value] if not isinstance(value, dict) else [*value, *value.values()]
    assert any(str(name) in str(error.value) for name in named)


def test_a_mask_that_looks_ahead_is_one_that_transformers_would_use(tmp_path):
    """Why is_causal: false is refused, though no code of the family itself reads it."""
    folder = with_config("llama2", tmp_path / "model", {"is_causal": False})
    theirs = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (folder, tiny_folder("llama2"))]
    looking_ahead, causal = (torch_logits(model, random_tokens(1, LENGTH)) for model in theirs)
    assert np.abs(looking_ahead - causal).max() > 0.1


def test_quantized_weights_are_refused_with_what_to_do_instead():
    with pytest.raises(ValueError, match="quantization_config=.*bitsandbytes.*model.quantization: nf4"):
        config_from_hf(LLAMA | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})


@pytest.mark.parametrize("layer_types", [["full_attention", "sliding_attention", "full_attention"], None])
def test_layers_of_mistral_may_differ_in_their_windows(layer_types, tmp_path):
    folder = with_config("mistral", tmp_path / "model", {"layer_types": layer_types})
    assert_logits_match(folder, random_tokens(1, LENGTH))


def test_windows_that_are_not_switched_on_are_refused():
    config = json.loads(ARCHITECTURES["qwen3"].to_json_string(use_diff=False))
    with pytest.raises(ValueError, match="layer_types=.*use_sliding_window is not true"):
        config_from_hf(config | {"layer_types": ["sliding_attention"] * 3})
