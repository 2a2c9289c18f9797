"""A run with lora.a_init=eva starts at the components of its layers' inputs on the tokens of responses."""

import jax
import numpy as np
from tiny_pairs import LLAMA, random_pairs, table_of, tiny_decoder

from lora_dpo_jax.data.shapes import PackingConfig
from lora_dpo_jax.lora import LoraConfig, equals_reference, loraize
from lora_dpo_jax.runs.eva import with_eva
from lora_dpo_jax.runs.steps import lay_out_steps
from lora_dpo_jax.sharding import MeshConfig, Placement

LORA = LoraConfig(r=3, a_init="eva", target_modules=["q_proj", "lm_head"], rank_pattern={"1.*q_proj": 2})


def test_factors_are_the_components_of_the_inputs_of_responses():
    pairs, base = table_of(random_pairs(12)), tiny_decoder()
    steps = lay_out_steps(pairs, [np.arange(12)], PackingConfig(), parallelism=-1, row_shards=1)
    placement = Placement(MeshConfig(), jax.devices()[:1])
    new = loraize(base, LORA, key=jax.random.key(0))
    policy = with_eva(new, base, LORA, steps, placement, batch_size=12, key=jax.random.key(1))
    assert equals_reference(policy, None)
    (layer,) = policy.model.layers.segments[0].stacked.layers
    A = np.asarray(layer.self_attn.q_proj.lora_A.array)

    # The inputs of the first layer's q_proj are its norm of the embedded tokens.
    tokens = np.concatenate([answer for pair in random_pairs(12) for answer in pair.responses])
    embedded = np.asarray(base.model.embed_tokens.weight.array)[tokens]
    scale = np.sqrt((embedded**2).mean(1, keepdims=True) + LLAMA.norm_eps)
    inputs = (
        embedded / scale * np.asarray(base.model.layers.segments[0].stacked.layers[0].before_attention.weight.array)[0]
    )
    _, _, components = np.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
    # In the span of the components: they may be close to each other.
    np.testing.assert_allclose(np.linalg.norm(A[0] @ components[:3].T, axis=1), np.ones(3), atol=0.02)
    np.testing.assert_allclose(A[1, :2] @ A[1, :2].T, np.eye(2), atol=1e-5)
    assert not np.any(A[1, 2:])
    head = new.lm_head.lora_A.array
    np.testing.assert_array_equal(policy.lm_head.lora_A.array, head)
