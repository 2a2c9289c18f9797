"""Rotary position embeddings and the ways in which `config.json` can stretch them."""

import math
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import haliax as hax
import jax.numpy as jnp
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import HALF_HEAD

PairMember = Axis("pair_member", 2)
RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RopeConfig:
    """RoPE (https://arxiv.org/abs/2104.09864); names are those of transformers' `rope_parameters`.

    `dynamic` and `longrope` depend on the length of each sequence, that is of a prompt and one response. Up to
    `original_max_position_embeddings` tokens, `dynamic` equals `default`, and `longrope` uses its short factors.
    """

    theta: float = 10000.0
    type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3 only
    high_freq_factor: float = 4.0  # llama3 only
    original_max_position_embeddings: int = 8192  # tokens; llama3, dynamic, yarn, longrope and query_scale_beta only
    beta_fast: float = 32.0  # yarn only: turns within the original length above which a frequency stays as it is
    beta_slow: float = 1.0  # yarn only: turns below which a frequency is divided by `factor`
    truncate: bool = True  # yarn only: whether these bounds are rounded to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope only: divides each frequency
    long_factor: tuple[float, ...] = ()
    magnitude: float = 1.0  # of cos and sin: `attention_factor` in transformers
    rotary_dims: int | None = None  # the first dimensions of a head, which are rotated; None = all
    interleaved: bool = False  # rotates dimensions (2i, 2i + 1), not (i, i + half)
    # Queries at position p are scaled by 1 + beta * log(1 + floor(p / original_max_position_embeddings)).
    query_scale_beta: float = 0.0

    @property
    def depends_on_length(self) -> bool:
        return self.type in ("dynamic", "longrope")

    def dims(self, head_dim: int) -> int:
        """How many dimensions of a head are rotated."""
        return head_dim if self.rotary_dims is None else self.rotary_dims

    def check(self, head_dim: int) -> None:
        """Raises ValueError if heads of `head_dim` dimensions cannot be rotated."""
        dims = self.dims(head_dim)
        least = 4 if self.type == "dynamic" else 2  # `dynamic` divides by dims - 2
        if not least <= dims <= head_dim or dims % 2:
            raise ValueError(
                f"head_dim={head_dim} (by default: hidden_size / num_attention_heads), of which "
                f"partial_rotary_factor leaves {dims} dimensions to rotate: this must be even and at least {least}, "
                "because rotary embeddings rotate pairs of dimensions"
            )
        if self.type == "longrope":
            for name in ("short_factor", "long_factor"):
                if len(factors := getattr(self, name)) != dims // 2:
                    raise ValueError(
                        f"{name} in rope_parameters or rope_scaling has {len(factors)} numbers; needed: {dims // 2}, "
                        "one for each pair of dimensions"
                    )

    def inverse_frequencies(self, dims: int, length: jnp.ndarray) -> jnp.ndarray:
        """Radians per token, float32[dims / 2], or [..., dims / 2] if they depend on `length` [...] (tokens)."""
        exponents = jnp.arange(0, dims, 2, dtype=jnp.float32) / dims
        if self.type == "dynamic":
            return 1.0 / (self._stretched_theta(dims, length)[..., None] ** exponents)
        frequencies = 1.0 / (self.theta**exponents)
        if self.type == "linear":
            return frequencies / self.factor
        if self.type == "llama3":
            return self._llama3(frequencies)
        if self.type == "yarn":
            return self._yarn(frequencies)
        if self.type == "longrope":
            short, long = (jnp.array(factors, jnp.float32) for factors in (self.short_factor, self.long_factor))
            return frequencies / jnp.where(length[..., None] > self.original_max_position_embeddings, long, short)
        return frequencies

    def _stretched_theta(self, dims: int, length: jnp.ndarray) -> jnp.ndarray:
        stretch = jnp.maximum(length, self.original_max_position_embeddings) / self.original_max_position_embeddings
        return self.theta * (self.factor * stretch - (self.factor - 1)) ** (dims / (dims - 2))

    def _llama3(self, frequencies: jnp.ndarray) -> jnp.ndarray:
        # Divides the frequencies of long wavelengths by `factor`, keeps those of short ones, and blends those between.
        wavelengths = 2 * math.pi / frequencies
        turns = self.original_max_position_embeddings / wavelengths
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = jnp.clip(keep, 0.0, 1.0)
        return keep * frequencies + (1 - keep) * frequencies / self.factor

    def _yarn(self, frequencies: jnp.ndarray) -> jnp.ndarray:
        """Section 3.2 of https://arxiv.org/abs/2309.00071: as `_llama3`, but blends by the number of the dimension."""
        dims = 2 * len(frequencies)

        def dimension(turns: float) -> float:
            """The dimension, counted in pairs, that turns so often within the original length."""
            length = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return dims * math.log(length) / (2 * math.log(self.theta))

        first, last = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dims - 1)
        width = last - first if last != first else 0.001
        divide = jnp.clip((jnp.arange(dims // 2, dtype=jnp.float32) - first) / width, 0.0, 1.0)
        return frequencies / self.factor * divide + frequencies * (1 - divide)


class RotaryAngles(eqx.Module):
    """What rotates queries and keys; float32."""

    cos: NamedArray  # {row, position, half_head}
    sin: NamedArray
    query_scale: NamedArray | None  # {row, position}: a factor of queries besides
    interleaved: bool = eqx.field(static=True)

    def rotate(self, x: NamedArray, HeadSize: Axis) -> NamedArray:
        """Rotates pairs of dimensions of `x` by the angles of their positions. Returns the axes of `x`."""
        half = self.cos.resolve_axis(HALF_HEAD).size
        first, second = (part.astype(jnp.float32) for part in self._pairs(x, HeadSize))
        turned = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        turned = [part.astype(x.dtype) for part in turned]
        if self.interleaved:
            neighbours = hax.stack(PairMember, turned).rearrange((..., HALF_HEAD, PairMember))
            parts = [neighbours.flatten_axes((HALF_HEAD, PairMember), HeadSize.resize(2 * half))]
        else:
            parts = [part.rename({HALF_HEAD: HeadSize.name}) for part in turned]
        if 2 * half < HeadSize.size:
            parts.append(x[HeadSize, 2 * half :])
        return hax.concatenate(HeadSize, parts).rearrange(x.axes)

    def _pairs(self, x: NamedArray, HeadSize: Axis) -> tuple[NamedArray, NamedArray]:
        """The first and the second dimensions of all pairs, {..., half_head}."""
        half = self.cos.resolve_axis(HALF_HEAD).size
        if self.interleaved:
            Half = Axis(HALF_HEAD, half)
            pairs = x[HeadSize, : 2 * half].unflatten_axis(HeadSize.name, (Half, PairMember))
            return pairs[PairMember, 0], pairs[PairMember, 1]
        halves = x[HeadSize, :half], x[HeadSize, half : 2 * half]
        first, second = (part.rename({HeadSize.name: HALF_HEAD}) for part in halves)
        return first, second

    def rotate_queries(self, x: NamedArray, HeadSize: Axis) -> NamedArray:
        """The same for queries, which a model may scale by their positions as well."""
        turned = self.rotate(x, HeadSize)
        if self.query_scale is None:
            return turned
        return (turned * self.query_scale.astype(x.dtype)).rearrange(x.axes)


def rotary_angles(
    config: RopeConfig, position_ids: NamedArray, lengths: NamedArray | None, HeadSize: Axis
) -> RotaryAngles:
    """The angles of tokens at positions {row, position}.

    `lengths` (tokens) is the length of each token's sequence, with the same axes. Only some types use it.
    """
    Half = Axis(HALF_HEAD, config.dims(HeadSize.size) // 2)
    of_length = jnp.int32(0) if lengths is None else lengths.rearrange(position_ids.axes).array
    frequencies = config.inverse_frequencies(2 * Half.size, of_length)
    positions = position_ids.array.astype(jnp.float32)
    angles = hax.named(positions[..., None] * frequencies, (*position_ids.axes, Half))
    query_scale = None
    if config.query_scale_beta:
        turn = jnp.floor(positions / config.original_max_position_embeddings)
        query_scale = hax.named(1.0 + config.query_scale_beta * jnp.log1p(turn), position_ids.axes)
    cos, sin = hax.cos(angles) * config.magnitude, hax.sin(angles) * config.magnitude
    return RotaryAngles(cos, sin, query_scale, config.interleaved)
