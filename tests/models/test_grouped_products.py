"""Rows times the matrix of their group are what each group's product is by itself, on CPUs and on GPUs."""

import dataclasses
import functools
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax import Axis
from tiny_pairs import LLAMA, moved

from lora_dpo_jax.lora import LoraConfig, loraize, trainable_filter
from lora_dpo_jax.models.compute import ComputeConfig
from lora_dpo_jax.models.config import ExpertsConfig
from lora_dpo_jax.models.experts import Experts
from lora_dpo_jax.models.grouped_products import grouped_dot
from lora_dpo_jax.models.grouped_products.blocks import BlockedProducts
from lora_dpo_jax.models.grouped_products.gpu import TritonProducts
from lora_dpo_jax.models.grouped_products.grouped_dot import PRODUCTS as OF_PLATFORMS
from lora_dpo_jax.models.grouped_products.grouped_dot import grouped_dot_by
from lora_dpo_jax.models.stack import LayerStack

# Kernels of GPUs run in Pallas's interpreter.
PRODUCTS = {"blocked": BlockedProducts(), "triton": TritonProducts(largest_block=32, interpret=True)}
ROWS = 61  # no multiple of a block
SIZES = {
    "even": [16, 16, 16, 13],
    "uneven": [1, 37, 0, 23],
    "with a rest": [0, 17, 30, 2],
    "of one group": [0, 0, 61, 0],
    "of none": [0, 0, 0, 0],
}


@dataclass(frozen=True)
class Sides:
    """Sizes of the matrices, and the axis that is contracted."""

    num_out: int
    num_in: int
    contracted: Literal[1, 2] = 2
    dtype: Any = jnp.float32

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Rows, matrices, and the gradient of the product."""
        rng = np.random.default_rng(0)
        sides = (self.num_in, self.num_out)
        of_rows, of_product = sides if self.contracted == 2 else sides[::-1]
        shapes = (ROWS, of_rows), (4, self.num_out, self.num_in), (ROWS, of_product)
        return tuple(rng.normal(size=shape).astype(self.dtype) for shape in shapes)

    def one_by_one(self, rows, matrices, sizes, cotangent) -> list[np.ndarray]:
        """The product and its gradients in float64."""
        rows, matrices, cotangent = (np.asarray(x, np.float64) for x in (rows, matrices, cotangent))
        found, of_rows, of_matrices = np.zeros_like(cotangent), np.zeros_like(rows), np.zeros_like(matrices)
        ends = np.cumsum(sizes)
        for group, end in enumerate(ends):
            mine = slice(end - sizes[group], end)
            matrix = matrices[group] if self.contracted == 2 else matrices[group].T
            found[mine], of_rows[mine] = rows[mine] @ matrix.T, cotangent[mine] @ matrix
            outer = cotangent[mine].T @ rows[mine]
            of_matrices[group] = outer if self.contracted == 2 else outer.T
        return [found, of_rows, of_matrices]


# Larger than blocks and no multiples of them; multiples, which need no masks; and the factors of an adapter of rank 8.
SIDES = {
    "edges": Sides(37, 70),
    "edges, turned": Sides(37, 70, contracted=1),
    "whole blocks in bfloat16": Sides(64, 32, dtype=jnp.bfloat16),
    "factor A": Sides(8, 40),
    "factor B in bfloat16": Sides(40, 8, dtype=jnp.bfloat16),
}
CASES = [("blocked", "edges"), ("blocked", "edges, turned"), *(("triton", sides) for sides in SIDES)]


@functools.cache
def compiled(platform: str, contracted: Literal[1, 2]):
    """The product in float32 and its gradients, compiled once for all sizes of groups."""

    def product(rows, matrices, sizes, cotangent):
        def of(rows, matrices):
            return grouped_dot_by(PRODUCTS[platform], rows, matrices, sizes, jnp.dtype("float32"), contracted)

        found, pull = jax.vjp(of, rows, matrices)
        return found, *pull(cotangent.astype(jnp.float32))

    return jax.jit(product)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("platform, sides", CASES)
def test_products_and_gradients_are_those_of_each_group_alone(platform, sides, name):
    case, sizes = SIDES[sides], np.array(SIZES[name])
    rows, matrices, cotangent = case.arrays()
    wanted = case.one_by_one(rows, matrices, sizes, cotangent)
    found = compiled(platform, case.contracted)(rows, matrices, sizes, cotangent)
    assert [x.dtype for x in found] == [jnp.float32, case.dtype, case.dtype]
    for one, expected, rtol in zip(found, wanted, (1e-5, *[float(jnp.finfo(case.dtype).eps)] * 2), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), expected, rtol=max(rtol, 1e-5), atol=1e-5)


@pytest.mark.parametrize("platform", PRODUCTS)
def test_what_follows_the_last_group_reaches_nothing(platform):
    """Not even if it is not a number."""
    rows, matrices, cotangent = SIDES["edges"].arrays()
    rows[49:] = cotangent[49:] = np.nan
    found = compiled(platform, 2)(rows, matrices, np.array(SIZES["with a rest"]), cotangent)
    assert all(np.isfinite(x).all() for x in found)


@pytest.mark.parametrize("platform", PRODUCTS)
def test_frozen_matrices_cost_no_gradient(platform):
    rows, matrices, cotangent = SIDES["edges"].arrays()

    def gradient(rows, sizes, cotangent):
        of = functools.partial(grouped_dot_by, PRODUCTS[platform], matrices=matrices, sizes=sizes)
        return jax.vjp(lambda rows: of(rows, dtype=jnp.dtype("float32"), contracted=2), rows)[1](cotangent)

    program = jax.jit(gradient).lower(rows, np.array(SIZES["even"]), cotangent).compile().as_text()
    assert len(re.findall(r" dot\(", program)) == 1


def test_no_group_multiplies_the_rows_of_another():
    shapes = jnp.zeros((4096, 5)), jnp.zeros((4, 3, 5)), np.array([1000] * 4)
    program = jax.jit(lambda *of: grouped_dot(*of, dtype=jnp.float32)).lower(*shapes).compile().as_text()
    products = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", program)
    assert products and all(math.prod(map(int, sizes.split(","))) == 128 * 3 for sizes in products)


@pytest.mark.parametrize("platform", PRODUCTS)
def test_a_layer_is_multiplied_out_of_its_stack(platform, monkeypatch):
    case, sizes = SIDES["edges"], np.array(SIZES["with a rest"])
    rows, matrices, cotangent = case.arrays()
    stack = np.stack([matrices + 1, matrices, matrices - 1])
    monkeypatch.setitem(OF_PLATFORMS, "cpu", PRODUCTS[platform])

    @jax.jit
    def products(stack, sizes, layer):
        of = functools.partial(grouped_dot, matrices=stack, sizes=sizes, dtype=jnp.dtype("float32"), layer=layer)
        return of(rows), of(cotangent, contracted=1)

    wanted = case.one_by_one(rows, matrices, sizes, cotangent)[:2]
    for found, expected in zip(products(stack, sizes, 1), wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_layers_of_experts_are_the_same_by_the_kernels_for_gpus(monkeypatch):
    """Their output, and the gradients of the input and of the adapters. No weight is sliced out of its stack."""
    config = dataclasses.replace(LLAMA, experts=ExpertsConfig(num_experts=4, per_token=2, intermediate_size=24))

    @eqx.filter_jit
    def make():
        kind = functools.partial(Experts.init, config)
        keys = jax.random.split(jax.random.key(0), 3)
        plain = LayerStack.init(lambda _, key: kind(key=key), [0, 0], ComputeConfig(), key=keys[0])
        x = hax.random.normal(keys[1], (Axis("row", 2), Axis("position", 24), config.Embed))
        return loraize(plain, LoraConfig(r=3), key=keys[2]), x

    layers, x = make()
    adapters, weights = eqx.partition(moved(layers), trainable_filter(layers))
    segments = hax.named(np.int32(np.arange(24) < np.array([[24], [17]])), x.axes[:2])  # the rest is padding

    def results():
        def layer(experts, x, segments, *_):
            return x + experts(x, segments)[0], None

        def of(adapters, x):
            output = lambda adapters, x: eqx.combine(adapters, weights).scan(layer, x, segments)[0].array  # noqa: E731
            found, pull = jax.vjp(output, adapters, x)
            return found, pull(jnp.sin(found))

        return jax.tree.leaves(jax.jit(of)(adapters, x))

    class Recording(TritonProducts):
        def product(self, rows, matrices, sizes, **options):
            read.add(matrices.shape)
            return super().product(rows, matrices, sizes, **options)

    wanted, read = results(), set()
    monkeypatch.setitem(OF_PLATFORMS, "cpu", Recording(largest_block=32, interpret=True))
    for found, expected in zip(results(), wanted, strict=True):
        largest = np.abs(
            expected
        ).max()  # sums over tokens, of terms that cancel, are rounded in proportion to the terms
        assert largest > 0
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest)
    frozen = {shape for shape in read if 3 not in shape}  # the others are of adapters, of rank 3
    assert frozen == {(2 * 4, 24, config.Embed.size), (2 * 4, config.Embed.size, 24)}
