"""The vocabulary that a base was enlarged to before an adapter was trained on it.

PEFT then stores embedding and head whole beside the adapter. Their first rows are those of the base, and the rows after
them belong to the new tokens. The base of the adapter is the model with these matrices.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_dpo_jax.huggingface.adapter_config import STEM, adapter_folder, read_peft
from lora_dpo_jax.huggingface.adapter_names import matrix_copies
from lora_dpo_jax.huggingface.tensors import LazyTensor, TensorFiles
from lora_dpo_jax.models import DecoderConfig

NAMES = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}


@dataclass(frozen=True)
class Enlargement:
    """Matrices with more rows than the base's, by the names of the base's tensors; none if it was not enlarged."""

    matrices: Mapping[str, LazyTensor] = field(default_factory=dict)
    adapter: Path | None = None  # the folder that they lie in

    def __bool__(self) -> bool:
        return bool(self.matrices)

    def config(self, config: DecoderConfig) -> DecoderConfig:
        """The base's config with the rows of the matrices."""
        if not self:
            return config
        return dataclasses.replace(config, vocab_size=next(iter(self.matrices.values())).info.shape[0])

    def tensors(self, tensors: TensorFiles) -> TensorFiles:
        """The base's tensors with these matrices."""
        return tensors.replaced(self.matrices)

    def write_config(self, folder: Path) -> None:
        """Corrects the size of the vocabulary in `folder`/config.json."""
        if not self:
            return
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        rows = next(iter(self.matrices.values())).info.shape[0]
        holder: dict[str, Any] = config["text_config"] if "vocab_size" in config.get("text_config", {}) else config
        holder["vocab_size"] = rows
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_enlargement(adapter: Path, base: Path, config: DecoderConfig) -> Enlargement:
    """The enlarged matrices beside an adapter, for the base in `base`.

    Matrices that replace the base's (modules_to_save) are none. Raises ValueError if the first rows are not the base's.
    """
    adapter = adapter_folder(adapter)
    if read_peft(adapter).values.get("modules_to_save"):
        return Enlargement()
    files = TensorFiles(adapter, STEM)
    larger = {key: name for key, name in matrix_copies(files.names).items() if files.shape(key)[0] > config.vocab_size}
    needed = ["embed_tokens"] if config.tie_word_embeddings else [*NAMES]
    matrices = {NAMES[name]: files.view(key) for key, name in larger.items() if name in needed}
    if not matrices:
        return Enlargement()
    if config.has_wrapper:
        raise ValueError(
            f"{adapter}: holds {', '.join(larger)} of an enlarged vocabulary, which is not read for models of text and "
            "images; PEFT's merge_and_unload makes a model of it"
        )
    rows = {view.info.shape[0] for view in matrices.values()}
    if len(matrices) < len(needed) or len(rows) > 1:
        found = ", ".join(f"{key} {files.shape(key)}" for key in larger)
        raise ValueError(
            f"{adapter}: an enlarged vocabulary needs {' and '.join(needed)} of one size; it holds {found}"
        )
    tensors = TensorFiles(base)
    for key, name in larger.items():
        if NAMES[name] in tensors.names and not _begins_with(files.view(key), tensors.view(NAMES[name])):
            raise ValueError(
                f"{adapter}: the first rows of {key} are not the base's, so it was trained too, or on another base; "
                "PEFT's merge_and_unload makes a model of it"
            )
    return Enlargement(matrices, adapter)


def _begins_with(enlarged: LazyTensor, base: LazyTensor) -> bool:
    """Whether the first rows are the base's, at the lower of the two precisions."""
    ours = base[()]
    theirs = enlarged[(slice(0, len(ours)),)]
    rounded = theirs.astype(ours.dtype).astype(theirs.dtype)
    return ours.shape == theirs.shape and bool(np.array_equal(ours.astype(rounded.dtype), rounded))
