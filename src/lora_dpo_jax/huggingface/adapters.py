"""Reads and writes adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A tensor is called `base_model.model.<path of the layer>.<factor>`: `lora_A.weight`, {r, in}, or `lora_B.weight`,
{out, r}. Each kind of `Adapter` defines its factors. Of a parameter of all experts, {experts * r, in} and
{out, r * experts}, and the path is that of PEFT's wrapper.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import haliax as hax
import haliax.nn as hnn
import jax
import numpy as np
from haliax import NamedArray

from lora_dpo_jax.axes import EXPERT, RANK
from lora_dpo_jax.huggingface.adapter_config import (
    CONFIG,
    STEM,
    WRAPPER,
    adapter_folder,
    base_from_anywhere,
    peft_config,
    read_adapter_config,
    read_peft,
    refused_modules,
)
from lora_dpo_jax.huggingface.adapter_names import (
    PREFIX,
    adapter_paths,
    key_of,
    matrix_copies,
    written_names,
)
from lora_dpo_jax.huggingface.card import CARD, model_card
from lora_dpo_jax.huggingface.dialects import embedding_of
from lora_dpo_jax.huggingface.folders import export_folder
from lora_dpo_jax.huggingface.tensors import (
    LazyTensor,
    TensorFiles,
    abridged,
    sharded_array,
    write_tensors,
)
from lora_dpo_jax.huggingface.tokenizers import save_tokenizer
from lora_dpo_jax.huggingface.views import PaddedTensor
from lora_dpo_jax.huggingface.vocabulary import Enlargement
from lora_dpo_jax.json_objects import JsonObject, is_texts
from lora_dpo_jax.lora import (
    HEAD,
    PEFT_SWITCHES,
    ROWS,
    Adapter,
    Factor,
    LayerNames,
    LoraConfig,
    TokenRows,
    adapt,
    adapter_type,
    empty_adapter,
    layer_names,
    linear_layers,
    map_linear_layers,
    matching_names,
    matching_parameters,
    unadaptable_layers,
    with_token_rows,
)
from lora_dpo_jax.lora.adapter import stack_axes
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.sharding import on_host

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerAdapter:
    """The adapter of one layer, or of one parameter, on the host. `adapter` may hold a stack of them."""

    name: str  # the dotted path of the layer
    adapter: Adapter
    rank: int
    scaling: float
    matrices: dict[str, np.ndarray]  # by PEFT's names, float32 [*gathered, a dimension for each side]: see `Factor`

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """As PEFT stores them."""
        return {key: factor.tensor_of(self.matrices[key]) for key, factor in self.adapter.factors.items()}

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(*gathered, out, in)"""
        return self.adapter.weight_shape

    def merge_into(self, weight: np.ndarray, place: tuple[int, int] | None = None) -> None:
        """Merges into the weight [*gathered, out, in], in place; computed in float32 and rounded once, as PEFT does.

        `place`: the weight is only a part of that, as in `Piece`.
        """
        matrices = self.matrices
        if place is not None:
            number, among = place
            matrices = {key: values[number] for key, values in matrices.items()}
            rows = slice(among * len(weight), (among + 1) * len(weight))
            matrices["lora_B.weight"] = matrices["lora_B.weight"][rows]
        for at in np.ndindex(weight.shape[:-2]):
            own = {key: values[at] for key, values in matrices.items()}
            merged = self.adapter.merge(weight[at].astype(np.float32), own, self.scaling)
            weight[at] = merged.astype(weight.dtype)


def save_adapter(
    model: CausalLM,
    folder: str | Path,
    *,
    base_model: str,
    config: LoraConfig,
    revision: str | None = None,
    tokenizer: Any = None,
    peft_scaling: str = "as_is",
    enlargement: Enlargement | None = None,
    card: Callable[..., str] = model_card,
    dtype: Any = np.float32,
    run: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the adapters for `peft.PeftModel.from_pretrained`, to a path or a URL (see `export_folder`).

    `base_model` is the folder, URL or hub id from which readers load the base, `revision` its revision on the hub.
    `tokenizer`, if given, is saved beside the adapters with its chat template; so are the matrices of `enlargement`.
    `config` is the config of the adapters; but the target modules are those of the model. `peft_scaling` as_is keeps
    these settings; plain writes the same adapter at one rank, with lora_alpha / r as the scaling of every layer and the
    rest of it in B. `card` makes the README.md from the arguments of `model_card`. Every process of a run must call
    this; only the first one writes.
    """
    _check_config(model, config)
    found, config = layer_adapters(model), config.as_written()
    adapters = [adapter for adapter in found if adapter.adapter.is_target]
    if any(axis.name == EXPERT for adapter in adapters for axis in stack_axes(adapter.adapter.wrapped)):
        # PEFT puts the matrices of all experts together as parameters, for which it refuses any dropout.
        config = dataclasses.replace(config, dropout=0.0)
    if jax.process_index() != 0:
        return
    if peft_scaling == "plain":
        config = config.with_plain_scaling(max(adapter.rank for adapter in adapters))
        adapters = [_at(adapter, config.r, config.scaling) for adapter in adapters]
    names = layer_names(model)
    # PEFT may be able to adapt layers that we cannot adapt.
    modules = [*names.modules, *unadaptable_layers(model)]
    if model.config.has_wrapper:  # its images' layers may have the same names at the end
        modules += [f"model.vision_tower.{name.rpartition('.')[2]}" for name in modules]
    adapted = {adapter.name for adapter in adapters}
    targets = explicit_targets([name for name in names.modules if name in adapted], modules)
    parameters = [name for name in names.parameters if name in adapted]
    config = dataclasses.replace(config, target_parameters=_explicit_parameters(parameters, names.parameters))
    paths = adapter_paths(names.modules, parameters)
    tensors = {
        key_of(paths.get(adapter.name, adapter.name), factor): tensor.astype(dtype)
        for adapter in (*adapters, *(adapter for adapter in found if not adapter.adapter.is_target))
        for factor, tensor in adapter.tensors.items()
    }
    if enlargement is not None:
        tensors |= {_key_of_matrix(name, found): matrix[()] for name, matrix in enlargement.matrices.items()}
    base = base_from_anywhere(base_model)
    with export_folder(folder, run=run, overwrite=overwrite) as exported:
        write_tensors(exported / f"{STEM}.safetensors", tensors)
        if tokenizer is not None:
            save_tokenizer(tokenizer, exported)
        text = card(base, config, targets + (config.target_parameters or []), revision=revision)
        (exported / CARD).write_text(text, encoding="utf-8")
        settings = peft_config(base, revision, config, targets, [adapter.name for adapter in adapters])
        (exported / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def load_adapter(model: CausalLM, folder: Path, *, mapping: Any = None, base_model: str | None = None) -> CausalLM:
    """The plain `model` with the adapters in `folder`, float32 whatever the file's dtype.

    `mapping` (axis name to mesh axis) gives their sharding; `base_model` is the model's name in messages. Raises
    ValueError with the folder and the tensor or setting if the adapter does not fit the model, or computes something
    that our adapters cannot.
    """
    folder = adapter_folder(folder)
    peft, config, tensors = read_peft(folder), read_adapter_config(folder), TensorFiles(folder, STEM)
    made_for = peft.text("base_model_name_or_path", None)
    try:
        copies = matrix_copies(tensors.names)
        names = _without_wrapper(layer_names(model))
        parameters = [names.parameters[name] for name in matching_parameters([*names.parameters], config)]
        targets = {names.modules[name] for name in matching_names([*names.modules], config)} | {*parameters}
        paths = adapter_paths(names.modules.values(), parameters)
        embedding = embedding_of(model.config).removesuffix(".weight")
        tensors = tensors.renamed(_written_names(tensors, [*paths.values(), embedding]))
        if model.lm_head is None and any(".lm_head.lora_" in key for key in tensors.names):
            raise MisfitError(
                f"{folder}: adapts lm_head, which this model ties to the input embedding; that is not supported"
            )
        _check_parameters(folder, config, model, parameters)
        empty = adapt(model, targets, lambda layer, chosen: empty_adapter(layer, chosen, config))
        empty = _with_token_rows(empty, config, folder)
        rows = [name for layer, names in linear_layers(empty) if isinstance(layer, TokenRows) for name in names]
        paths = {name: paths[name] for name in targets} | {name: name for name in rows}
        _check_tensors(tensors, empty, paths, config, [*copies, *_rows_of_tied_head(tensors, empty)])
        _check_copies(tensors, copies, peft, model)

        def fill(layer: Any, names: list[str]) -> Any:
            return _filled(tensors, layer, names, paths, mapping) if isinstance(layer, Adapter) else layer

        adapted = map_linear_layers(fill, empty)
    except MisfitError as error:
        given = f"a model of {model.config.num_layers} layers, hidden_size {model.config.hidden_size}"
        given = f"{base_model!r}, {given}" if base_model else given
        raise ValueError(f"{error}. It was made for base_model_name_or_path={made_for!r}; given is {given}") from error
    if made_for and base_model and PurePosixPath(made_for).name != PurePosixPath(base_model).name:
        logger.warning("%s: made for %r and put on %r, which it fits by its shapes", folder, made_for, base_model)
    return adapted


class MisfitError(ValueError):
    """An adapter does not fit the model."""


def layer_adapters(model: CausalLM) -> list[LayerAdapter]:
    """Copies the adapters of a model to the host. With several processes, all must call this."""
    found = []
    for adapter, names in linear_layers(model):
        if not isinstance(adapter, Adapter):
            continue
        adapter = adapter.plain()
        factors = adapter.factors
        matrices = {key: _matrices_on_host(factor, len(names)) for key, factor in factors.items()}
        for index, name in enumerate(names):
            rank, scaling = adapter.settings_of(index)
            if not rank:
                continue
            own = {key: of_names[index][_within(factors[key], rank)] for key, of_names in matrices.items()}
            found.append(LayerAdapter(name, adapter, rank, scaling, own))
    return found


def _at(adapter: LayerAdapter, rank: int, scaling: float) -> LayerAdapter:
    """The same adapter at another rank, with zeros, and under another scaling: what is left of its own is in B."""
    A, B = (adapter.matrices[f"lora_{side}.weight"] for side in "AB")
    if not math.isclose(adapter.scaling, scaling, rel_tol=1e-9):
        B = B * np.float32(adapter.scaling / scaling)
    before, more = [(0, 0)] * (A.ndim - 2), (0, rank - adapter.rank)
    A, B = np.pad(A, [*before, more, (0, 0)]), np.pad(B, [*before, (0, 0), more])
    matrices = adapter.matrices | {"lora_A.weight": A, "lora_B.weight": B}
    return dataclasses.replace(adapter, rank=rank, scaling=scaling, matrices=matrices)


def _within(factor: Factor, rank: int) -> tuple[slice, ...]:
    """The part of a factor's matrices that a layer of this rank has."""
    of_sides = (slice(rank if [axis.name for axis in side] == [RANK] else None) for side in factor.matrix_sides)
    return *[slice(None)] * len(factor.gathered), *of_sides


def _key_of_matrix(name: str, adapters: list[LayerAdapter]) -> str:
    """PEFT's name of a whole matrix beside an adapter, which may have rows of its own."""
    layer = name.removesuffix(".weight")
    has_rows = any(adapter.name == layer for adapter in adapters)
    return f"{PREFIX}{layer}.token_adapter.base_layer.weight" if has_rows else f"{PREFIX}{name}"


def _with_token_rows(model: CausalLM, config: LoraConfig, folder: Path) -> CausalLM:
    try:
        return with_token_rows(model, config)
    except ValueError as error:
        raise MisfitError(f"{folder}: {error}") from error


def explicit_targets(targets: list[str], names: list[str]) -> list[str]:
    """The shortest list that matches `targets` and nothing else among `names`: q_proj, ..., or else full paths."""
    suffixes = sorted({name.rpartition(".")[2] for name in targets})
    if set(matching_names(names, LoraConfig(target_modules=suffixes))) == set(targets):
        return suffixes
    return targets


def _explicit_parameters(targets: list[str], names: list[str]) -> list[str] | None:
    """The same for parameters: mlp.experts.down_proj, or else full paths."""
    suffixes = list(dict.fromkeys(".".join(name.split(".")[-3:]) for name in targets))
    whole = set(matching_parameters(names, LoraConfig(target_parameters=suffixes))) == set(targets)
    return (suffixes if whole else targets) or None


def _without_wrapper(names: LayerNames) -> Any:
    """By name without the part that only models of text and images have, as the settings of adapters are read."""
    return LayerNames(*({name.replace(f".{WRAPPER}.", "."): name for name in of_kind} for of_kind in names))  # pyright: ignore


def _matrices_on_host(factor: Factor, count: int) -> np.ndarray:
    """float32 [name, *gathered, a dimension for each side]"""
    gathered = [axis.size for axis in factor.array.resolve_axis(factor.gathered)]
    sides = [math.prod(axis.size for axis in side) for side in factor.matrix_sides]
    return on_host(factor.matrices().array).astype(np.float32).reshape(count, *gathered, *sides)


def _check_config(model: CausalLM, config: LoraConfig) -> None:
    found = [(layer, names) for layer, names in linear_layers(model) if isinstance(layer, Adapter)]
    adapted = [(layer, names) for layer, names in found if layer.is_target]
    if not adapted:
        raise ValueError("the model has no adapters to save")
    rows = {layer.part: layer.token_ids for layer, _ in found if isinstance(layer, TokenRows)}
    if rows != (asked := config.token_rows(tied=getattr(model, HEAD, "absent") is None)):
        raise ValueError(f"the model trains rows of {rows}, but lora.trainable_token_indices names {asked}")
    switches = " and ".join(f"lora.{switch}={getattr(config, switch)}" for switch in PEFT_SWITCHES)
    for adapter, name, index in ((adapter, name, i) for adapter, names in adapted for i, name in enumerate(names)):
        own = config.for_layer(name)
        found = type(adapter), *adapter.settings_of(index)
        asked = adapter_type(adapter.wrapped, own), own.r, own.scaling
        if found != asked and found[1]:
            (has, r, scaling), (makes, *_) = found, asked
            raise ValueError(
                f"{name} has a {has.__name__} with r={r} and scaling={scaling}, but lora.r={own.r}, lora.alpha="
                f"{own.alpha} and {switches} make a {makes.__name__} with r={own.r}, scaling={own.scaling}"
            )


def _written_names(tensors: TensorFiles, paths: Collection[str]) -> dict[str, str]:
    try:
        return written_names(tensors.names, paths)
    except ValueError as error:
        raise MisfitError(f"{tensors.folder}: {error}") from error


def _check_parameters(folder: Path, config: LoraConfig, model: CausalLM, parameters: list[str]) -> None:
    experts = model.config.experts
    if config.target_parameters and not parameters:
        how = "it has none"
        if experts is not None and not experts.gathered:
            how = "each matrix of its experts is apart: load it with read_config(folder, lora)"
        raise MisfitError(
            f"{folder}: target_parameters={config.target_parameters} names no parameter of the model; {how}"
        )


def _check_tensors(
    tensors: TensorFiles, empty: CausalLM, paths: Mapping[str, str], config: LoraConfig, copies: Collection[str]
) -> None:
    """Raises MisfitError unless the file holds the factors of the targets, as in `empty`, and nothing else.

    `paths`: by target, the path in the file.
    """
    factors = {
        name: [*layer.factors] for layer, names in linear_layers(empty) if isinstance(layer, Adapter) for name in names
    }
    needed = [key_of(paths[name], factor) for name in sorted(paths) for factor in factors[name]]
    settings = {"target_modules": config.target_modules, "exclude_modules": config.exclude_modules}
    settings |= {"layers_to_transform": config.layers_to_transform, "layers_pattern": config.layers_pattern}
    settings |= {"use_dora": config.use_dora or None, "target_parameters": config.target_parameters}
    chosen = ", ".join(f"{key}={value!r}" for key, value in settings.items() if value is not None)
    asked = f"{CONFIG}'s {chosen or 'target_modules=null'} names {abridged(sorted(paths)) or 'none'}"
    if missing := [key for key in needed if key not in tensors.names]:
        raise MisfitError(f"{tensors.folder}: tensors are missing: {abridged(missing)}; {asked}")
    surplus = [key for key in tensors.names if key not in needed and key not in copies]
    if surplus or not paths:
        raise MisfitError(f"{tensors.folder}: holds tensors that have no place: {abridged(surplus) or 'none'}; {asked}")


def _rows_of_tied_head(tensors: TensorFiles, model: CausalLM) -> list[str]:
    """The rows of a tied head, which PEFT writes beside the same rows of the embedding if that was enlarged."""
    rows, ours = key_of("lm_head", ROWS), key_of(embedding_of(model.config).removesuffix(".weight"), ROWS)
    if model.lm_head is not None or rows not in tensors.names or ours not in tensors.names:
        return []
    if tensors.shape(rows) != tensors.shape(ours) or not np.array_equal(tensors.read(rows), tensors.read(ours)):
        raise MisfitError(f"{tensors.folder}: {rows} differs from {ours}, and this model's head is its embedding")
    return [rows]


def _filled(tensors: TensorFiles, empty: Adapter, names: list[str], paths: Mapping[str, str], mapping: Any) -> Adapter:
    """The adapter of a layer, or of a stack, with the factors that the file has for its targets, by their `paths`."""

    def view(name: str, index: int, key: str, factor: Factor) -> Any:
        if name not in paths:
            return None
        rank, _ = empty.settings_of(index)
        shape = tuple(tuple(axis.size for axis in side) for side in factor.sides)
        own = tuple(tuple(rank if axis.name == RANK else axis.size for axis in side) for side in factor.sides)
        found = _tensor(tensors, key_of(paths[name], key), tuple(math.prod(side) for side in own))
        return found if own == shape else PaddedTensor(found, own, shape)

    def read(key: str, factor: Factor) -> NamedArray:
        axes = factor.array.axes
        views = [view(name, index, key, factor) for index, name in enumerate(names)]
        return hax.named(sharded_array(views, factor.sides, axes, mapping, np.float32), axes)

    return empty.with_factors({key: read(key, factor) for key, factor in empty.factors.items()})


def _tensor(tensors: TensorFiles, key: str, shape: tuple[int, ...]) -> LazyTensor:
    info = tensors.info(key)
    if info.shape != shape:
        raise MisfitError(
            f"{tensors.folder}: tensor {key} has shape {info.shape}; the model and {CONFIG}'s r and rank_pattern need "
            f"{shape}"
        )
    if not info.is_float:
        raise ValueError(f"{tensors.folder}: tensor {key} holds {info.dtype}; needed: floating-point numbers")
    return tensors.view(key)


def _check_copies(tensors: TensorFiles, copies: Mapping[str, str], peft: JsonObject, model: CausalLM) -> None:
    """Raises an error unless the embedding and the head that PEFT stored are those of the model."""
    head = model.lm_head.weight if isinstance(model.lm_head, hnn.Linear) else model.model.embed_tokens.weight
    weights = {"embed_tokens": model.model.embed_tokens.weight, "lm_head": head}
    others = [key for key, matrix in copies.items() if not _is_copy(tensors, key, weights[matrix].array)]
    saved = peft.taken("modules_to_save", None, is_texts, "a list of names")
    if saved and (others or not {name.rpartition(".")[2] for name in saved} <= set(copies.values())):
        raise refused_modules(peft, others)
    for key in others:
        why = _how_it_differs(tensors, key, weights[copies[key]].array.shape)
        raise MisfitError(f"{tensors.folder}: holds tensors that have no place: {key} {why}")


def _is_copy(tensors: TensorFiles, key: str, ours: jax.Array) -> bool:
    """Whether a tensor equals the model's, at the lower of the two precisions."""
    if tensors.shape(key) != ours.shape:
        return False
    theirs = tensors.read(key)
    rounded = theirs.astype(ours.dtype).astype(theirs.dtype)
    return bool((ours.astype(rounded.dtype) == rounded).all())


def _how_it_differs(tensors: TensorFiles, key: str, ours: tuple[int, ...]) -> str:
    theirs = tensors.shape(key)
    if theirs[0] > ours[0] and theirs[1:] == ours[1:]:
        return (
            f"has {theirs[0]} rows, and the model has {ours[0]}: the vocabulary was enlarged before the adapter was "
            "trained. Load the base with huggingface.vocabulary.read_enlargement, as the commands do"
        )
    return (
        "is not the model's, so the adapter was trained on another base, or with this matrix; PEFT's merge_and_unload "
        "makes a model of it"
    )
