import json

import numpy as np
import pytest
import transformers
from tiny_models import (
    ARCHITECTURES,
    LENGTH,
    in_the_words_of_transformers_4,
    load,
    logits,
    random_tokens,
    tiny_folder,
    torch_logits,
)

from lora_dpo_jax.huggingface.weights import read_config
from lora_dpo_jax.models import config_from_hf


def assert_logits_match(folder, tokens):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    np.testing.assert_allclose(logits(load(folder), tokens), torch_logits(theirs, tokens), rtol=0, atol=1e-4)


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


@pytest.mark.parametrize(
    "feature",
    [
        {"attn_logit_softcapping": 50.0},
        {"quantization_config": {"quant_method": "gptq"}},
        {"hidden_act": "relu2"},
        {"model_type": "gemma2"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ],
    ids=str,
)
def test_features_that_are_not_supported_are_errors_that_name_them(feature):
    config = json.loads(ARCHITECTURES["llama2"].to_json_string(use_diff=False))
    ((key, value),) = feature.items()
    named = [str(v) for v in value.values()] + [*value] if isinstance(value, dict) else [str(value)]
    with pytest.raises(ValueError, match="config.json: ") as error:
        config_from_hf(config | feature)
    assert key in str(error.value) or any(name in str(error.value) for name in named)
