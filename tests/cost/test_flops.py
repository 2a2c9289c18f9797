"""MFU counts what a step's tokens need, and compares it with what the devices can."""

from types import SimpleNamespace

import numpy as np
import pytest
from tiny_pairs import lengths_of, new_adapters, packed, random_pairs, table_of

from lora_dpo_jax.cost.devices import peak_flops
from lora_dpo_jax.cost.flops import useful_flops
from lora_dpo_jax.data.shapes import choose_shapes
from lora_dpo_jax.lora import LoraLinear, linear_layers, unwrap_lora


@pytest.fixture(scope="module")
def adapted():
    return new_adapters("llama")


def test_a_pass_costs_two_operations_a_weight_and_token(adapted):
    """The cost model per pair: 2N a token and pass, 6 a parameter of the adapters, attention and head aside."""
    pairs = table_of(random_pairs(3))
    batch = packed(pairs, choose_shapes([np.arange(3)], pairs.sizes).parts[0])
    config = adapted.config
    prompt, chosen, rejected = lengths_of(pairs).sum(axis=0)
    tokens, targets = prompt + chosen + rejected, chosen + rejected
    seen = sum(
        sum(range(1, p + 1)) + sum(range(p + 1, p + c + 1)) + sum(range(p + 1, p + r + 1))
        for p, c, r in lengths_of(pairs)
    )
    adapters = [linear for linear, _ in linear_layers(adapted.model) if isinstance(linear, LoraLinear)]
    in_adapters = sum(linear.lora_A.size + linear.lora_B.size for linear in adapters)
    blocks = sum(linear.weight.size for linear, _ in linear_layers(unwrap_lora(adapted).model))
    one_pass = 2 * blocks * tokens + 2 * config.hidden_size * config.vocab_size * targets
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * seen
    policy = 2 * one_pass + 6 * in_adapters * tokens + 3 * attention
    assert float(useful_flops(adapted, batch, with_reference=False)) == pytest.approx(policy, rel=1e-5)
    both = policy + one_pass + attention
    assert float(useful_flops(adapted, batch, with_reference=True)) == pytest.approx(both, rel=1e-5)


def test_the_peak_is_that_of_all_devices_or_unknown():
    known = SimpleNamespace(device_kind="TPU v5p"), SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    assert peak_flops(known) == 459e12 + 989e12
    assert peak_flops([*known, SimpleNamespace(device_kind="cpu")]) is None
