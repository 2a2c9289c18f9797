"""Where the tensors of a file lie in the model's parameters, whose names are PEFT's.

    file                                           parameters
    model.layers.0.mlp.experts.gate_up_proj        model.layers.0.mlp.experts.0.gate_proj.weight    [0, :n]
                                                   model.layers.0.mlp.experts.0.up_proj.weight      [0, n:]
                                                   model.layers.0.mlp.experts.1.gate_proj.weight    [1, :n] ...

                                                   where the model's experts are gathered:
    model.layers.0.mlp.experts.gate_up_proj        model.layers.0.mlp.experts.gate_up_proj.weight
    model.layers.0.mlp.experts.0.gate_proj.weight  model.layers.0.mlp.experts.gate_up_proj.weight, there [0, :n]

    language_model.model.layers.0.mlp.up_proj.weight
                                                   model.language_model.layers.0.mlp.up_proj.weight
    vision_tower...                                none

transformers 4 wrote a tensor for each matrix of each expert; transformers 5 can write those of all experts as one.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_dpo_jax.huggingface.views import TransposedTensor
from lora_dpo_jax.models import DecoderConfig
from lora_dpo_jax.models.config import ExpertsConfig

# Of a model of text and images: what transformers 4 called its parts.
WRAPPED = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
WRAPPED_BEFORE = re.compile("^(" + "|".join(map(re.escape, WRAPPED)) + ")")
ALL_EXPERTS = re.compile(r"(.*\.mlp)\.experts\.(gate_up_proj|down_proj)(_bias)?")
ONE_EXPERT = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Piece:
    """A parameter, or a part of it, that is a tensor of a file, or a part of that."""

    parameter: str
    rows: tuple[int, int, int] | None = None  # in the tensor {matrix, row, column}: matrix, start, stop; None = all
    # In the parameter {matrix, row, column}: the matrix, and its place among those that lie below each other there.
    place: tuple[int, int] | None = None
    is_transposed: bool = False  # the tensor is {matrix, column, row}

    def of(self, tensor: Any) -> Any:
        """The lazy part of a lazy tensor."""
        if self.is_transposed:
            return TransposedTensor(tensor)
        return tensor if self.rows is None else tensor.rows_of(*self.rows)

    def of_array(self, array: np.ndarray) -> np.ndarray:
        """The part of an array, as a view."""
        if self.is_transposed:
            return array.swapaxes(1, 2)
        if self.rows is None:
            return array
        matrix, start, stop = self.rows
        return array[matrix, start:stop]


def pieces_of(name: str, shape: tuple[int, ...], config: DecoderConfig) -> list[Piece]:
    """What the tensor `name` of a file holds; nothing if it is not of text."""
    if config.has_wrapper:
        name = WRAPPED_BEFORE.sub(lambda found: WRAPPED[found[0]], name)
        if not name.startswith(("model.language_model.", "lm_head.")):
            return []
    if name.endswith(".sinks"):
        return [Piece(f"{name}.weight")]
    if config.experts is None:
        return [Piece(name)]
    return _pieces_of_experts(name, shape, config.experts)


def _pieces_of_experts(name: str, shape: tuple[int, ...], experts: ExpertsConfig) -> list[Piece]:
    gate, up, down = experts.matrix_names
    if (found := ALL_EXPERTS.fullmatch(name)) and experts.gathered:
        kind = "bias" if found[3] else "weight"
        return [
            Piece(f"{found[1]}.experts.{found[2]}.{kind}", is_transposed=experts.is_transposed and kind == "weight")
        ]
    if found and len(shape) == 3:
        count, rows, _ = shape
        parts = {down: (0, rows)} if found[2] == "down_proj" else {gate: (0, rows // 2), up: (rows // 2, rows)}
        module = f"{found[1].removesuffix('mlp')}{experts.module_name}.experts"
        return [
            Piece(f"{module}.{number}.{matrix}.weight", (number, *bounds))
            for number in range(count)
            for matrix, bounds in parts.items()
        ]
    places = {gate: ("gate_up_proj", 0), up: ("gate_up_proj", 1), down: ("down_proj", 0)}
    if experts.gathered and (found := ONE_EXPERT.fullmatch(name)) and found[3] in places:
        matrix, place = places[found[3]]
        return [Piece(f"{found[1]}.mlp.experts.{matrix}.weight", place=(int(found[2]), place))]
    return [Piece(re.sub(r"\.(mlp|block_sparse_moe)\.gate\.weight$", f".{experts.module_name}.gate.weight", name))]


def embedding_of(config: DecoderConfig) -> str:
    """The name of the input embedding's parameter."""
    return "model.language_model.embed_tokens.weight" if config.has_wrapper else "model.embed_tokens.weight"
