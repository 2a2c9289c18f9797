"""Rotary position embeddings and the ways in which `config.json` can stretch them."""

import math
from dataclasses import dataclass
from typing import Literal

import haliax as hax
import jax.numpy as jnp
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import HALF_HEAD

RopeType = Literal["default", "linear", "dynamic", "llama3"]


@dataclass(frozen=True)
class RopeConfig:
    """RoPE (https://arxiv.org/abs/2104.09864); names are those of transformers' `rope_parameters`.

    `dynamic` equals `default` for sequences of up to `original_max_position_embeddings` tokens. Beyond, it depends on
    the longest sequence of the forward pass.
    """

    theta: float = 10000.0
    type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3 only
    high_freq_factor: float = 4.0  # llama3 only
    original_max_position_embeddings: int = 8192  # tokens; llama3 and dynamic only

    def inverse_frequencies(self, head_dim: int, length: jnp.ndarray) -> jnp.ndarray:
        """Radians per token, float32[head_dim / 2]. Only `dynamic` uses `length` (tokens)."""
        exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
        if self.type == "dynamic":
            return 1.0 / (self._stretched_theta(head_dim, length) ** exponents)
        frequencies = 1.0 / (self.theta**exponents)
        if self.type == "linear":
            return frequencies / self.factor
        if self.type == "llama3":
            return self._llama3(frequencies)
        return frequencies

    def _stretched_theta(self, head_dim: int, length: jnp.ndarray) -> jnp.ndarray:
        stretch = jnp.maximum(length, self.original_max_position_embeddings) / self.original_max_position_embeddings
        return self.theta * (self.factor * stretch - (self.factor - 1)) ** (head_dim / (head_dim - 2))

    def _llama3(self, frequencies: jnp.ndarray) -> jnp.ndarray:
        # Divides the frequencies of long wavelengths by `factor`, keeps those of short ones, and blends those between.
        wavelengths = 2 * math.pi / frequencies
        turns = self.original_max_position_embeddings / wavelengths
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = jnp.clip(keep, 0.0, 1.0)
        return keep * frequencies + (1 - keep) * frequencies / self.factor


def rotary_angles(config: RopeConfig, position_ids: NamedArray, HeadSize: Axis) -> tuple[NamedArray, NamedArray]:
    """cos and sin of each token's angles, float32 {..., position, half_head}, from positions {..., position}."""
    Half = Axis(HALF_HEAD, HeadSize.size // 2)
    length = position_ids.array.max() + 1
    frequencies = hax.named(config.inverse_frequencies(HeadSize.size, length), Half)
    angles = position_ids.astype(jnp.float32).broadcast_axis(Half) * frequencies
    return hax.cos(angles), hax.sin(angles)


def rotate(x: NamedArray, cos: NamedArray, sin: NamedArray, HeadSize: Axis) -> NamedArray:
    """Rotates (x[i], x[i + half]), as in Hugging Face, by the angle of its position. Returns the axes of `x`."""
    half = HeadSize.size // 2
    first = x[HeadSize, :half].rename({HeadSize.name: HALF_HEAD}).astype(jnp.float32)
    second = x[HeadSize, half:].rename({HeadSize.name: HALF_HEAD}).astype(jnp.float32)
    turned = [first * cos - second * sin, second * cos + first * sin]
    turned = [part.rename({HALF_HEAD: HeadSize.name}) for part in turned]
    return hax.concatenate(HeadSize, turned).rearrange(x.axes).astype(x.dtype)
