"""Weights of four bits in files: MXFP4, of the OCP Microscaling Formats (MX) Specification 1.0.

    file                                                     read as
    ...experts.gate_up_proj_blocks  uint8 {expert, out, group, 16}      ...experts.gate_up_proj  BF16 {expert, in, out}
    ...experts.gate_up_proj_scales  uint8 {expert, out, group}

A byte holds two neighbouring inputs, the even one in its low bits. A group of 32 inputs shares a power of two.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from lora_dpo_jax.huggingface.tensors import LazyTensor, TensorFiles, TensorInfo

METHOD = "mxfp4"  # in quantization_config
BLOCKS, SCALES = "_blocks", "_scales"
# The sixteen values of E2M1: sign, two bits of exponent, one of mantissa.
VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], np.float32)
BIAS = 127  # of the exponents in scales
GROUP = 32  # inputs


@dataclass(frozen=True)
class Mxfp4Tensor:
    """The values of a packed tensor, bfloat16 {expert, in, out}. Indexed and described as a `LazyTensor`."""

    blocks: LazyTensor
    scales: LazyTensor

    @property
    def info(self) -> TensorInfo:
        experts, out, groups = self.scales.info.shape
        return TensorInfo("BF16", (experts, groups * GROUP, out))

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        experts, inputs, _ = self.info.shape
        matrices, rows, columns = (*index, *[slice(None)] * (3 - len(index)))
        start, stop, _ = rows.indices(inputs)
        groups = slice(start // GROUP, -(-stop // GROUP))
        before = groups.start * GROUP
        found = []
        for expert in range(experts)[matrices]:  # float32 values of one expert at a time are in memory
            at = slice(expert, expert + 1), columns, groups
            values = decoded(self.blocks[at][0], self.scales[at][0])
            found.append(values[:, start - before : stop - before].T)
        return np.stack(found)


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """uint8 [..., group, 16] and uint8 [..., group] -> the values, bfloat16 [..., 32 * group]."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], GROUP)
    values = np.ldexp(VALUES[codes], scales.astype(np.int32)[..., None] - BIAS).astype(ml_dtypes.bfloat16)
    return values.reshape(*blocks.shape[:-2], -1)


def unpacked(tensors: TensorFiles) -> TensorFiles:
    """The same files, with the values of packed tensors, each under one name, in the place of blocks and scales."""
    names = set(tensors.names)
    packed = [name.removesuffix(BLOCKS) for name in tensors.names if name.endswith(BLOCKS)]
    packed = [name for name in packed if name + SCALES in names]
    if not packed:
        return tensors
    views = {name: _checked(tensors, name) for name in packed}
    return tensors.without([name + part for name in packed for part in (BLOCKS, SCALES)]).replaced(views)


def _checked(tensors: TensorFiles, name: str) -> Mxfp4Tensor:
    blocks, scales = tensors.view(name + BLOCKS), tensors.view(name + SCALES)
    expected = (*scales.info.shape, GROUP // 2)
    if len(scales.info.shape) != 3 or blocks.info.shape != expected or {blocks.info.dtype, scales.info.dtype} != {"U8"}:
        raise ValueError(
            f"{tensors.folder}: {name}{BLOCKS} is {blocks.info.dtype} {blocks.info.shape} and {name}{SCALES} is "
            f"{scales.info.dtype} {scales.info.shape}; needed: U8 (experts, out, in / 32, 16) and U8 (experts, out, "
            "in / 32)"
        )
    return Mxfp4Tensor(blocks, scales)
