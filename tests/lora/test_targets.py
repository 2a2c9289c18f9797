"""Where adapters go; PEFT, live, says where they should."""

import warnings

import jax
import pytest
import torch
import transformers
from tiny_pairs import LLAMA, VOCAB, tiny_decoder

from lora_dpo_jax.lora import LoraConfig, linear_layers, loraize, matching_names

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


def peft_targets(targets, excluded) -> set[str]:
    """The layers of a Llama of the same shape that PEFT adapts."""
    shape = dict(hidden_size=LLAMA.hidden_size, intermediate_size=LLAMA.intermediate_size, vocab_size=VOCAB)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**shape, num_hidden_layers=LLAMA.num_layers, num_attention_heads=LLAMA.num_heads)
        )
        config = peft.LoraConfig(target_modules=targets, exclude_modules=excluded, task_type="CAUSAL_LM")
        tuned = peft.get_peft_model(model, config)
    layers = (name for name, module in tuned.base_model.model.named_modules()
              if isinstance(module, peft.tuners.lora.LoraLayer))  # fmt: skip
    return set(layers)


@pytest.mark.parametrize(
    "targets, excluded",
    [
        (["q_proj", "v_proj"], None),
        (["self_attn.q_proj", "mlp.up_proj"], None),
        (["layers.1.mlp.down_proj"], None),
        (["1.mlp.down_proj", "0.self_attn.o_proj"], None),
        (["model.layers.0.self_attn.k_proj", "lm_head"], None),
        (r".*\.(q|k)_proj", None),
        (r"model\.layers\.1\..*_proj", None),
        (r".*proj|lm_head", None),
        (["q_proj", "k_proj", "down_proj"], ["k_proj", "layers.0.mlp.down_proj"]),
        (["q_proj", "k_proj", "lm_head"], r".*layers\.0.*"),
        (r".*", ["embed_tokens", "mlp", "self_attn", "lm_head"]),
        (None, None),
        (None, ["lm_head", "o_proj"]),
    ],
)
def test_targets_match_as_in_peft(targets, excluded):
    names = [name for _, names in linear_layers(tiny_decoder()) for name in names]
    ours = set(matching_names(names, LoraConfig(target_modules=targets, exclude_modules=excluded)))
    if targets == r".*":  # PEFT would adapt modules that are no linear layers too, and stops there
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    # Our null is every linear layer but the head, which is what PEFT calls all-linear.
    assert ours == peft_targets("all-linear" if targets is None else targets, excluded)


@pytest.mark.parametrize("targets", [["query"], ["proj"], "q_proj", r".*\.experts\..*", []])
def test_if_nothing_matches_the_error_lists_what_exists(targets):
    with pytest.raises(ValueError) as error:
        loraize(tiny_decoder(), LoraConfig(target_modules=targets), key=jax.random.key(0))
    message = str(error.value)
    assert f"lora.target_modules={targets!r}" in message
    assert "matches none of the 15 linear layers" in message
    assert all(name in message for name in ("model.layers.*.self_attn.q_proj", "model.layers.*.mlp.up_proj", "lm_head"))


def test_a_name_that_matches_nothing_beside_others_is_an_error_too():
    with pytest.raises(ValueError, match=r"lora.target_modules: \['w1'\] match no linear layer; .*q_proj"):
        loraize(tiny_decoder(), LoraConfig(target_modules=["q_proj", "w1"]), key=jax.random.key(0))


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], r".*_proj|lm_head"])
def test_the_head_of_a_tied_model_is_refused_with_the_reason(targets):
    with pytest.raises(ValueError, match="ties its head to the input embedding"):
        loraize(tiny_decoder("qwen"), LoraConfig(target_modules=targets), key=jax.random.key(0))
