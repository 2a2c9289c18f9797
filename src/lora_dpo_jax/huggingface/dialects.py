"""From the names of tensors in a file to those of the model's parameters, which are PEFT's.

    file                                           parameters
    model.layers.0.mlp.experts.gate_up_proj        model.layers.0.mlp.experts.0.gate_proj.weight    [0, :n]
                                                   model.layers.0.mlp.experts.0.up_proj.weight      [0, n:]
                                                   model.layers.0.mlp.experts.1.gate_proj.weight    [1, :n] ...

    language_model.model.layers.0.mlp.up_proj.weight
                                                   model.language_model.layers.0.mlp.up_proj.weight
    vision_tower...                                none

transformers 4 wrote a tensor for each matrix of each expert; transformers 5 can write those of all experts as one.
"""

import re
from dataclasses import dataclass

import numpy as np

from lora_dpo_jax.huggingface.tensors import LazyTensor
from lora_dpo_jax.models import DecoderConfig

# Of a model of text and images: what transformers 4 called its parts.
WRAPPED = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
WRAPPED_BEFORE = re.compile("^(" + "|".join(map(re.escape, WRAPPED)) + ")")
FUSED = re.compile(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)")


@dataclass(frozen=True)
class Part:
    """Some rows of one of the matrices in a tensor {matrix, row, column}; or a whole tensor if `matrix` is None."""

    matrix: int | None = None
    start: int = 0
    stop: int = 0

    def of(self, tensor: LazyTensor) -> LazyTensor:
        return tensor if self.matrix is None else tensor.rows_of(self.matrix, self.start, self.stop)

    def of_array(self, array: np.ndarray) -> np.ndarray:
        """A view of the part."""
        return array if self.matrix is None else array[self.matrix, self.start : self.stop]


def parameters_of(name: str, shape: tuple[int, ...], config: DecoderConfig) -> dict[str, Part]:
    """The parameters that the tensor `name` of a file holds, and the part that is each; none if it is not of text."""
    if config.has_wrapper:
        name = WRAPPED_BEFORE.sub(lambda found: WRAPPED[found[0]], name)
        if not name.startswith(("model.language_model.", "lm_head.")):
            return {}
    experts = config.experts
    if experts is None:
        return {name: Part()}
    fused = FUSED.fullmatch(name)
    if fused is None or len(shape) != 3:
        return {re.sub(r"\.mlp\.gate\.weight$", f".{experts.block_name}.gate.weight", name): Part()}
    count, rows, _ = shape
    gate, up, down = experts.matrix_names
    half = rows // 2
    parts = {down: (0, rows)} if fused[2] == "down_proj" else {gate: (0, half), up: (half, rows)}
    return {
        f"{fused[1]}.{experts.block_name}.experts.{number}.{matrix}.weight": Part(number, *bounds)
        for number in range(count)
        for matrix, bounds in parts.items()
    }


def embedding_of(config: DecoderConfig) -> str:
    """The name of the input embedding's parameter."""
    return "model.language_model.embed_tokens.weight" if config.has_wrapper else "model.embed_tokens.weight"
