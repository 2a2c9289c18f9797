"""Layers are what they are, however they are held: alike in one scan, in a period, or each by itself."""

import dataclasses

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax import Axis
from tiny_pairs import LLAMA

from lora_dpo_jax.lora import LoraConfig, linear_layers, loraize, trainable_filter
from lora_dpo_jax.models import CachedMask, CausalLM, ComputeConfig, PackedMask
from lora_dpo_jax.models import stack as stack_module
from lora_dpo_jax.models.mlp import Mlp
from lora_dpo_jax.models.stack import periods
from lora_dpo_jax.tensor_names import Parameter, map_parameters

# Two turns of a period, and a layer that is left.
CONFIG = dataclasses.replace(LLAMA, num_layers=5, sliding_windows=(5, None, 5, None, 5))
Row, Pos = Axis("row", 2), Axis("position", 16)
TOKENS = hax.named(np.random.default_rng(1).integers(0, LLAMA.vocab_size, (2, 16), dtype=np.int32), (Row, Pos))
MASK = PackedMask.causal(Row, Pos)


@pytest.mark.parametrize(
    "kinds, expected",
    [
        ("aaaa", [("a", 4)]),
        ("ababab", [("ab", 3)]),
        ("aaab", [("a", 3), ("b", 1)]),
        ("aaabaaabaa", [("aaab", 2), ("a", 2)]),
        ("abcab", [("a", 1), ("b", 1), ("c", 1), ("a", 1), ("b", 1)]),
        ("", []),
    ],
)
def test_the_period_that_goes_furthest_is_found(kinds, expected):
    assert [("".join(period), repeats) for period, repeats in periods(kinds)] == expected


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same for the same name, whatever array it becomes a part of."""
    rng = np.random.default_rng(list(name.encode()))
    return rng.normal(1.0 if "norm" in name else 0.0, 0.2, shape).astype(np.float32)


def decoder(compute: ComputeConfig | None = None) -> CausalLM:
    """Of CONFIG, with weights that follow from their names."""
    shapes = eqx.filter_eval_shape(CausalLM.init, CONFIG, compute or ComputeConfig(), key=jax.random.key(0))

    def fill(parameter: Parameter) -> hax.NamedArray:
        stack = parameter.stack_axes
        inner = [axis for side in parameter.sides for axis in side]
        tensors = [random_tensor(name, tuple(axis.size for axis in inner)) for name in parameter.names]
        stacked = np.stack(tensors).reshape([axis.size for axis in (*stack, *inner)])
        return hax.named(jnp.asarray(stacked), (*stack, *inner)).rearrange(parameter.axes)

    return map_parameters(fill, shapes)


@pytest.fixture(params=["none", "products", "full", "nested"])
def policy(request) -> str:
    return request.param


def loss_and_gradients(model: CausalLM) -> tuple[float, dict[str, np.ndarray]]:
    """Gradients of the adapters by the layer's name, of factors that are not zero."""
    adapted = loraize(model, LoraConfig(r=2, alpha=4.0, zero_init_b=False), key=jax.random.key(0))
    adapters, weights = eqx.partition(adapted, trainable_filter(adapted))
    adapters = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.05), adapters)

    def loss(adapters):
        logits = eqx.combine(adapters, weights)(TOKENS, MASK.position_ids, MASK)
        return hax.mean(hax.nn.log_softmax(logits, axis="vocab") ** 2).scalar()

    value, gradients = jax.jit(jax.value_and_grad(loss))(adapters)
    found = {}
    for linear, names in linear_layers(eqx.combine(gradients, weights)):
        if hasattr(linear, "lora_A"):
            for number, name in enumerate(names):
                found[f"{name}.lora_B"] = np.asarray(linear.lora_B["layers", number].array)
    return float(value), found


@pytest.fixture(scope="module")
def one_by_one() -> tuple[float, dict[str, np.ndarray]]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stack_module, "LONGEST_PERIOD", 1)
        apart = decoder()
    assert [s.Block.size for s in apart.model.layers.segments] == [1] * 5
    return loss_and_gradients(apart)


def test_a_period_computes_what_its_layers_compute_one_by_one(policy, one_by_one):
    together = decoder(ComputeConfig(policy))
    assert [s.Block.size for s in together.model.layers.segments] == [2, 1]
    value, gradients = loss_and_gradients(together)
    expected_value, expected = one_by_one
    assert value == pytest.approx(expected_value, rel=1e-6)
    assert gradients.keys() == expected.keys() and len(expected) == 5 * 7
    for name, gradient in expected.items():
        # Float32 sums, in another order where XLA fuses another way.
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=name)


@pytest.mark.parametrize("policy, most", [("full", 1.5), ("products", 16.0)])
def test_a_repeated_period_keeps_of_its_layers_what_the_policy_says(policy, most):
    """With each layer, the backward pass's memory grows by about the layer's input, or by that and its products."""
    tokens = hax.named(np.zeros((2, 64), np.int32), (Row, Pos.resize(64)))

    def temporary_bytes(repeats: int) -> int:
        config = dataclasses.replace(CONFIG, num_layers=2 * repeats, sliding_windows=(5, None) * repeats)
        compute = ComputeConfig(policy, attention="dense")

        def init(key):
            return loraize(CausalLM.init(config, compute, key=key), LoraConfig(r=2), key=key)

        def gradients(model: CausalLM):
            adapters, weights = eqx.partition(model, trainable_filter(model))

            def loss(adapters):
                hidden = eqx.combine(adapters, weights).model(tokens, positions, mask).hidden
                return hax.sum(hidden * hidden).scalar()

            return jax.grad(loss)(adapters)

        mask = PackedMask.causal(*tokens.axes)
        positions = hax.arange(tokens.axes[1]).broadcast_axis(Row)
        model = eqx.filter_eval_shape(init, jax.random.key(0))
        arrays, rest = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
        program = jax.jit(lambda arrays: gradients(eqx.combine(arrays, rest))).lower(arrays).compile()
        return program.memory_analysis().temp_size_in_bytes

    growth = (temporary_bytes(6) - temporary_bytes(2)) / 8
    assert growth < most * 4 * tokens.size * CONFIG.hidden_size


def test_a_cache_is_kept_for_each_layer_of_a_period():
    """Token by token through the cache, the logits are those of all tokens at once."""
    model = decoder()
    expected = model(TOKENS, MASK.position_ids, MASK)
    cache = model.model.empty_cache(Row, Pos.size)

    @jax.jit
    def step(token, cache, at):
        positions = hax.full((Row, Axis("position", 1)), 0) + at
        slots = hax.arange(Axis("key_position", Pos.size)).broadcast_to((Row, Axis("key_position", Pos.size)))
        mask = CachedMask(positions, hax.where(slots <= at, slots, -1))
        output = model.model(token, positions, mask, cache=cache, slot=at)
        return model.head(output.hidden), output.cache

    for at in range(Pos.size):
        logits, cache = step(TOKENS["position", at : at + 1], cache, jnp.int32(at))
        np.testing.assert_allclose(logits.array[:, 0], expected["position", at].array, rtol=1e-4, atol=1e-4)


class Telling(eqx.Module):
    """An Mlp that says how large its inputs are, as a router says how it shares tokens out."""

    mlp: Mlp

    def __call__(self, x, segments, *, key=None):
        out, _ = self.mlp(x, segments, key=key)
        return out, {"size": hax.sum(x * x, axis=("position", "embed"))}


def test_what_layers_tell_beside_hidden_states_is_summed_over_layers():
    model = decoder()

    def tell(layer):
        return eqx.tree_at(lambda node: node.mlp, layer, Telling(layer.mlp))

    segments = [
        eqx.tree_at(lambda s: s.stacked.layers, segment, tuple(tell(layer) for layer in segment.stacked.layers))
        for segment in model.model.layers.segments
    ]
    telling = eqx.tree_at(lambda node: node.model.layers.segments, model, tuple(segments))
    output = jax.jit(lambda m: m.model(TOKENS, MASK.position_ids, MASK))(telling)
    silent = model.model(TOKENS, MASK.position_ids, MASK)
    np.testing.assert_allclose(output.hidden.array, silent.hidden.array, rtol=1e-5, atol=1e-6)
    assert silent.auxiliary == {}

    layers = [
        hax.tree_util.tree_map(lambda array, at=at: array["layers", at], layer)
        for segment in model.model.layers.segments
        for at in range(segment.Block.size)
        for layer in segment.stacked.layers
    ]
    assert len(layers) == 5

    @jax.jit
    def by_hand(layers):
        x, total = model.model.embed(TOKENS), 0.0
        context = model.model._context(MASK.position_ids, MASK)
        for layer in layers:
            attended, _ = layer.self_attn(layer.before_attention(x), context, None)
            inputs = layer.before_mlp(x + attended)
            total = total + hax.sum(inputs * inputs, axis=("position", "embed"))
            x = layer(x, context).x
        return total

    np.testing.assert_allclose(output.auxiliary["size"].array, by_hand(layers).array, rtol=1e-5)
