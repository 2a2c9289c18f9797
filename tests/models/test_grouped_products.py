"""Rows times the matrix of their group: in blocks, as on CPUs, they are what each group's product is by itself."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_dpo_jax.models.grouped_products import grouped_dot

IN, OUT = 5, 3
SIZES = {
    "even": [16, 16, 16, 16],
    "uneven": [1, 40, 0, 23],
    "with a rest": [0, 17, 30, 2],
    "of one group": [0, 0, 64, 0],
    "of none": [0, 0, 0, 0],
}


def one_by_one(rows, matrices, sizes):
    """With the groups known while it is traced."""
    ends = np.cumsum(sizes)
    parts = [rows[end - size : end] @ matrix.T for matrix, size, end in zip(matrices, sizes, ends, strict=True)]
    return jnp.concatenate([*parts, jnp.zeros((len(rows) - ends[-1], OUT))])


@pytest.fixture(scope="module")
def compiled():
    """The product and its gradients, compiled once for all sizes."""

    def product(rows, matrices, sizes, cotangent):
        found, pull = jax.vjp(lambda *of: grouped_dot(*of, sizes, dtype=jnp.float32), rows, matrices)
        return found, *pull(cotangent)

    return jax.jit(product)


@pytest.mark.parametrize("name", SIZES)
def test_products_and_gradients_are_those_of_each_group_alone(compiled, name):
    sizes, rng = np.array(SIZES[name]), np.random.default_rng(0)
    rows, matrices, cotangent = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((64, IN), (4, OUT, IN), (64, OUT))
    )
    wanted, pull = jax.vjp(lambda *of: one_by_one(*of, sizes), rows, matrices)
    for found, expected in zip(compiled(rows, matrices, sizes, cotangent), (wanted, *pull(cotangent)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_what_follows_the_last_group_reaches_nothing(compiled):
    """Not even if it is not a number."""
    sizes = np.array([3, 20, 9, 1])
    rows, matrices, cotangent = jnp.ones((64, IN)).at[33:].set(np.nan), jnp.ones((4, OUT, IN)), jnp.ones((64, OUT))
    assert all(np.isfinite(found).all() for found in compiled(rows, matrices, sizes, cotangent))


def test_no_group_multiplies_the_rows_of_another():
    shapes = jnp.zeros((4096, IN)), jnp.zeros((4, OUT, IN)), np.array([1000] * 4)
    program = jax.jit(lambda *of: grouped_dot(*of, dtype=jnp.float32)).lower(*shapes).compile().as_text()
    products = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", program)
    assert products and all(math.prod(map(int, sizes.split(","))) == 128 * OUT for sizes in products)
