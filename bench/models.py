"""Models with random weights: as a folder that every system reads, or made where they are needed."""

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import transformers

from bench.profiles import SHAPES
from lora_dpo_jax.huggingface.tensors import TensorInfo, write_shards
from lora_dpo_jax.huggingface.weights import read_config
from lora_dpo_jax.models import CausalLM, ComputeConfig, DecoderConfig, config_from_hf
from lora_dpo_jax.models.compute import DEFAULT_COMPUTE
from lora_dpo_jax.sharding import Placement
from lora_dpo_jax.tensor_names import Parameter, map_parameters

DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # in safetensors' words
STD = SHAPES["22m"]["initializer_range"]


def decoder_config(model: str) -> DecoderConfig:
    """Of a shape by its name, or of a model's folder."""
    if model in SHAPES:
        return config_from_hf(SHAPES[model])
    if not Path(model).is_dir():
        raise ValueError(f"model={model!r} is neither a folder nor one of the shapes {[*SHAPES]}")
    return read_config(Path(model))


def write_folder(shape: str, folder: Path, *, seed: int = 0, with_weights: bool = True, dtype: str = "float32") -> Path:
    """A Hugging Face folder: config.json, a tokenizer that is never asked anything, and weights in `dtype`.

    Nothing is written where a whole folder stands already.
    """
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _stub_tokenizer(SHAPES[shape]["vocab_size"]).save_pretrained(folder)
    if with_weights:
        _write_weights(config_from_hf(SHAPES[shape]), folder, seed, dtype)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape] | {"dtype": dtype}, indent=2) + "\n")
    return folder


def random_model(
    config: DecoderConfig, compute: ComputeConfig, placement: Placement, *, dtype: Any, seed: int = 0
) -> CausalLM:
    """Random weights made on the devices that hold them, an array at a time."""
    keys = iter(jax.random.split(jax.random.key(seed), 1000))

    def make(parameter: Parameter) -> hax.NamedArray:
        shape = tuple(axis.size for axis in parameter.axes)
        sharding = hax.partitioning.sharding_for_axis(parameter.axes, placement.parameters, placement.mesh)
        draw = _ones if _is_norm(parameter) else _normal
        array = jax.jit(draw, static_argnums=(1, 2), out_shardings=sharding)(next(keys), shape, dtype)
        return hax.named(array, parameter.axes)

    return map_parameters(make, _template(config, compute))


def _ones(_, shape, dtype) -> jax.Array:
    return jnp.ones(shape, dtype)


def _normal(key, shape, dtype) -> jax.Array:
    return STD * jax.random.normal(key, shape, dtype)


def _write_weights(config: DecoderConfig, folder: Path, seed: int, dtype: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    norms: set[str] = set()

    def remember(parameter: Parameter) -> Any:
        shapes.update(dict.fromkeys(parameter.names, parameter.tensor_shape))
        norms.update(parameter.names if _is_norm(parameter) else ())
        return jax.ShapeDtypeStruct((), np.float32)

    map_parameters(remember, _template(config, DEFAULT_COMPUTE))
    numbers = {name: index for index, name in enumerate(shapes)}

    def draw(name: str) -> np.ndarray:
        if name in norms:
            return np.ones(shapes[name], jnp.dtype(dtype))
        rng = np.random.default_rng([seed, numbers[name]])
        return (STD * rng.standard_normal(shapes[name], np.float32)).astype(jnp.dtype(dtype))

    infos = {name: TensorInfo(DTYPES[dtype], shape) for name, shape in shapes.items()}
    write_shards(folder, infos, draw, max_shard_bytes=5 * 2**30)


def _template(config: DecoderConfig, compute: ComputeConfig) -> CausalLM:
    return eqx.filter_eval_shape(CausalLM.init, config, compute, key=jax.random.key(0))


def _is_norm(parameter: Parameter) -> bool:
    return len(parameter.tensor_shape) == 1 and "norm" in parameter.names[0]


def _stub_tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """TRL wants a tokenizer, though the pairs are token ids."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
