"""Models in Hugging Face's format: `config.json` and safetensors, read straight to their devices and written back."""

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax import NamedArray

from lora_dpo_jax.huggingface.adapter_config import CONFIG as ADAPTER_CONFIG
from lora_dpo_jax.huggingface.adapter_config import read_base_model
from lora_dpo_jax.huggingface.adapters import LayerAdapter, layer_adapters
from lora_dpo_jax.huggingface.card import BASE_CARD, CARD
from lora_dpo_jax.huggingface.dialects import embedding_of, pieces_of
from lora_dpo_jax.huggingface.folders import export_folder
from lora_dpo_jax.huggingface.mxfp4 import METHOD, unpacked
from lora_dpo_jax.huggingface.tensors import (
    TensorFiles,
    abridged,
    array_sharding,
    instead,
    sharded_array,
    write_shards,
)
from lora_dpo_jax.huggingface.tokenizers import drop_code, save_tokenizer
from lora_dpo_jax.huggingface.views import JoinedTensor
from lora_dpo_jax.huggingface.vocabulary import Enlargement
from lora_dpo_jax.json_objects import read_json_object
from lora_dpo_jax.lora import LoraConfig, linear_layers, unwrapped
from lora_dpo_jax.models import CausalLM, ComputeConfig, DecoderConfig, config_from_hf
from lora_dpo_jax.models.compute import DEFAULT_COMPUTE
from lora_dpo_jax.models.config_json import is_quantized_by
from lora_dpo_jax.models.quantization import QuantizedWeight, quantize_weight
from lora_dpo_jax.tensor_names import Parameter, map_parameters

logger = logging.getLogger(__name__)

# Tensors in old files that are computed from the config.
COMPUTED = re.compile(r".*rotary_emb\.inv_freq")
NOT_ENLARGED = Enlargement()
HEAD = "lm_head.weight"

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)
OTHER_FILES = ("config.json", "generation_config.json", "LICENSE*", "NOTICE*", "*processor_config.json")


def read_config(folder: Path, lora: LoraConfig | None = None) -> DecoderConfig:
    """The architecture in `folder`/config.json; ValueError names the file and what is not supported.

    Its experts are gathered if adapters with the settings `lora` have target_parameters.
    """
    config = _read_config(folder)
    if lora is None or not lora.target_parameters:
        return config
    if config.experts is None:
        raise ValueError(
            f"lora.target_parameters={lora.target_parameters} names parameters of experts, and {folder} has no "
            "experts: name its layers in lora.target_modules"
        )
    return config.with_gathered_experts()


def _read_config(folder: Path) -> DecoderConfig:
    if not (folder / "config.json").exists():
        if (folder / ADAPTER_CONFIG).exists():
            raise FileNotFoundError(
                f"{folder} holds an adapter and no model: give the model that it was made for "
                f"(base_model_name_or_path={read_base_model(folder)[0]!r}) as initialize_from_hf, and this folder as "
                "initialize_from_peft"
            )
        raise FileNotFoundError(f"{folder / 'config.json'} is missing {instead(folder)}")
    hf = read_json_object(folder / "config.json")
    config = config_from_hf(hf.values, hf.where)
    if config.has_wrapper and "tie_word_embeddings" not in hf.values and _has_head(folder):
        # Files of Mistral 3 leave the key out, whose default ties the head. transformers then obeys the tensors.
        return dataclasses.replace(config, tie_word_embeddings=False)
    return config


def _has_head(folder: Path) -> bool:
    try:
        return any(name.endswith(HEAD) for name in TensorFiles(folder).names)
    except FileNotFoundError:  # a folder with settings alone
        return False


def load_model(
    folder: Path,
    config: DecoderConfig,
    *,
    dtype: Any,
    compute: ComputeConfig = DEFAULT_COMPUTE,
    mapping: Mapping[str, Any] | None = None,
    quantization: str = "none",
    enlargement: Enlargement = NOT_ENLARGED,
) -> CausalLM:
    """The pretrained model with its weights in `dtype`. `quantization` (nf4, int8) is for the matrices of its layers.

    Under a mesh, `mapping` (axis name to mesh axis) gives the sharding. Each device reads only its part, and the host
    holds the parts of one array at a time. If there is an `enlargement`, `config` has the size of its vocabulary.
    Missing, surplus and misshapen tensors raise ValueError.
    """
    tensors = enlargement.tensors(_weights_in(folder, config))
    template = eqx.filter_eval_shape(CausalLM.init, config, compute, key=jax.random.key(0))
    _check_tensors(tensors, template)

    def read(parameter: Parameter) -> NamedArray | QuantizedWeight:
        if quantization != "none" and parameter.is_layer_matrix:
            return _read_quantized(tensors, parameter, dtype, mapping, quantization)
        views = [tensors.view(name) for name in parameter.names]
        return hax.named(sharded_array(views, parameter.sides, parameter.axes, mapping, dtype), parameter.axes)

    model = map_parameters(read, template)
    if errors := _quantization_errors(model):
        logger.info("%s: weights held as %s; %s", folder, quantization, errors)
    return model


def save_merged(
    model: CausalLM,
    source: Path,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    enlargement: Enlargement = NOT_ENLARGED,
    card: str | None = None,
    max_shard_bytes: int = 5 * 2**30,
    run: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the weights in `source` with the adapters of `model` merged in, to a path or URL (see `export_folder`).

    Each tensor is computed from the one in `source`, not from the model's copy, and keeps its dtype and name. Tensors
    without adapters keep their bits. So a quantized model is merged at full precision, and the log reports the error of
    the quantization. `tokenizer`, if given, is saved instead of the source's. `card` is the README.md; that of the
    source is BASE_MODEL_README.md. Every process of a run must call this; only the first one writes, with one tensor in
    memory.
    """
    adapters = {f"{adapter.name}.weight": adapter for adapter in layer_adapters(model)}
    if jax.process_index() != 0:
        return
    tensors = enlargement.tensors(unpacked(TensorFiles(source)))
    pieces = {name: pieces_of(name, tensors.shape(name), model.config) for name in tensors.names}
    _check_source(adapters, enlargement.tensors(_weights_in(source, model.config)))
    if model.config.tie_word_embeddings and embedding_of(model.config) in adapters:
        adapters[HEAD] = adapters[embedding_of(model.config)]  # some files hold a tied matrix twice, or as the head
    if errors := _quantization_errors(model):
        logger.info("%s: merged into the weights of %s, not into the quantized ones; %s", folder, source, errors)

    def merged(name: str) -> np.ndarray:
        tensor = tensors.read(name)
        for piece in pieces[name]:
            if piece.parameter in adapters:
                adapters[piece.parameter].merge_into(piece.of_array(tensor), piece.place)
        return tensor

    with export_folder(folder, run=run, overwrite=overwrite) as exported:
        _copy_files(source, exported, OTHER_FILES if tokenizer is not None else OTHER_FILES + TOKENIZER_FILES)
        if tokenizer is not None:
            save_tokenizer(tokenizer, exported)
        if card is not None:
            (exported / CARD).write_text(card, encoding="utf-8")
        if (source / CARD).is_file():
            shutil.copyfile(source / CARD, exported / BASE_CARD)
        enlargement.write_config(exported)
        _drop_quantization(exported)
        drop_code(exported)
        infos = {name: tensors.info(name) for name in tensors.names}
        write_shards(exported, infos, merged, max_shard_bytes=max_shard_bytes)


def _drop_quantization(folder: Path) -> None:
    """Takes quantization_config from `folder`/config.json if it is of weights that are exported as their values."""
    path = folder / "config.json"
    values = dict(read_json_object(path).values)
    if is_quantized_by(values, [METHOD]):
        del values["quantization_config"]
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _weights_in(folder: Path, config: DecoderConfig) -> TensorFiles:
    """The tensors under the names of the model's parameters. A tied matrix may have either name in the file."""
    tensors = unpacked(TensorFiles(folder))
    found: dict[str, Any] = {}
    parts: dict[str, dict[tuple[int, int], Any]] = {}
    for name in tensors.names:
        for piece in pieces_of(name, tensors.shape(name), config):
            view = piece.of(tensors.view(name))
            if piece.place is None:
                found[piece.parameter] = view
            else:
                parts.setdefault(piece.parameter, {})[piece.place] = view
    for parameter, of_parameter in parts.items():
        found[parameter] = _joined(folder, parameter, of_parameter)
    embedding = embedding_of(config)
    if config.tie_word_embeddings and HEAD in found and embedding not in found:
        found[embedding] = found.pop(HEAD)
    return tensors.only(found)


def _joined(folder: Path, parameter: str, parts: dict[tuple[int, int], Any]) -> JoinedTensor:
    """The matrices of experts as one tensor. Raises ValueError unless they are all there, with one shape and dtype."""
    count, places = (max(at) + 1 for at in zip(*parts, strict=True))
    infos = {view.info for view in parts.values()}
    if len(parts) != count * places or len(infos) > 1 or len(next(iter(infos)).shape) != 2:
        described = ", ".join(sorted(f"{info.dtype} {info.shape}" for info in infos))
        raise ValueError(
            f"{folder}: {parameter} is made of {count} experts with {places} matrices each; of these, the folder holds "
            f"{len(parts)}, of {described}. needed: all of them, with one shape and dtype"
        )
    return JoinedTensor(parts)


def _check_tensors(tensors: TensorFiles, template: CausalLM) -> None:
    """Raises ValueError unless the files hold the tensors that the template needs, and nothing else."""
    needed: dict[str, tuple[int, ...]] = {}

    def remember(parameter: Parameter) -> Any:
        needed.update(dict.fromkeys(parameter.names, parameter.tensor_shape))
        return jax.ShapeDtypeStruct((), np.float32)

    map_parameters(remember, template)
    found = [name for name in tensors.names if not COMPUTED.fullmatch(name)]
    if template.config.tie_word_embeddings and HEAD in found:
        found.remove(HEAD)
        _check_tied_head(tensors, embedding_of(template.config))
    if missing := [name for name in needed if name not in found]:
        raise ValueError(f"{tensors.folder}: tensors are missing: {abridged(missing)}")
    if surplus := [name for name in found if name not in needed]:
        raise ValueError(
            f"{tensors.folder}: holds tensors that config.json's architecture has no place for: {abridged(surplus)}"
        )
    for name, shape in needed.items():
        info = tensors.info(name)
        if info.shape != shape:
            raise ValueError(
                f"{tensors.folder}: tensor {name} has shape {info.shape}, but config.json asks for {shape}"
            )
        if not info.is_float:
            raise ValueError(
                f"{tensors.folder}: tensor {name} holds {info.dtype}, and only plain weights are read, not quantized "
                "ones: give the checkpoint that it was made from, and set model.quantization if it is too large"
            )


def _check_tied_head(tensors: TensorFiles, embedding: str) -> None:
    if not np.array_equal(tensors.read(HEAD), tensors.read(embedding)):
        raise ValueError(
            f"{tensors.folder}: config.json ties the head to the input embedding, but {HEAD} differs from {embedding}; "
            "set tie_word_embeddings to false there to use the head"
        )


def _read_quantized(tensors: TensorFiles, parameter: Parameter, dtype: Any, mapping, kind: str) -> QuantizedWeight:
    """Reads and quantizes tensor by tensor on the devices, which hold one tensor at a time in full precision."""
    assert parameter.matrix is not None
    Out, In = parameter.matrix
    stack = parameter.stack_axes
    axes = parameter.axes[len(stack) :]

    def read(name: str) -> NamedArray:
        return hax.named(sharded_array([tensors.view(name)], parameter.sides, axes, mapping, np.float32), axes)

    def is_named(node):
        return isinstance(node, NamedArray)

    def quantized(weight: NamedArray) -> QuantizedWeight:
        return quantize_weight(weight, In, Out, kind, dtype)

    def empty() -> QuantizedWeight:
        one = quantized(hax.zeros(axes))
        return jax.tree.map(lambda leaf: hax.zeros((*stack, *leaf.axes), leaf.dtype), one, is_leaf=is_named)

    def put(stacked: QuantizedWeight, weight: NamedArray, at) -> QuantizedWeight:
        one = quantized(weight)
        return jax.tree.map(
            lambda all, x: hax.named(all.array.at[tuple(at)].set(x.array), all.axes), stacked, one, is_leaf=is_named
        )

    shapes = jax.eval_shape(empty)
    shardings = jax.tree.map(lambda leaf: array_sharding(leaf.axes, mapping), shapes, is_leaf=is_named)
    stacked = jax.jit(empty, out_shardings=shardings)()
    put_layer = jax.jit(put, donate_argnums=0, out_shardings=shardings)
    for number, name in enumerate(parameter.names):
        at = np.unravel_index(number, [axis.size for axis in stack])
        stacked = put_layer(stacked, read(name), [jnp.int32(index) for index in at])
    return stacked


def _check_source(adapters: dict[str, LayerAdapter], tensors: TensorFiles) -> None:
    for name, adapter in adapters.items():
        shape = adapter.adapter.weight_shape
        if name not in tensors.names:
            raise ValueError(f"{tensors.folder}: has no tensor {name}, which has an adapter; is it the model's source?")
        if tensors.shape(name) != shape:
            raise ValueError(f"{tensors.folder}: tensor {name} has shape {tensors.shape(name)}, its adapter {shape}")


def _quantization_errors(model: CausalLM) -> str:
    """A text with the quantization error of each kind of layer; empty if the model is not quantized."""
    errors = {}
    for linear, names in linear_layers(model):
        weight = unwrapped(linear).weight
        if isinstance(weight, QuantizedWeight):
            each = np.asarray(weight.error.array)
            errors[names[0].rpartition(".")[2]] = f"{np.sqrt(np.mean(each**2)):.2%}"
    return f"|quantized - original| / |original| is {errors}" if errors else ""


def _copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file():
                copy = target / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
