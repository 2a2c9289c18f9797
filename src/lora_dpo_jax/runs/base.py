"""The pretrained model that a run starts from, its tokenizer, and the adapters on it: given ones or new ones."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from lora_dpo_jax.generation import read_stop_ids
from lora_dpo_jax.huggingface.adapter_config import adapter_folder, read_adapter_config
from lora_dpo_jax.huggingface.adapters import load_adapter
from lora_dpo_jax.huggingface.folders import local_folder
from lora_dpo_jax.huggingface.gguf_adapter import check_gguf
from lora_dpo_jax.huggingface.tokenizers import read_tokenizer
from lora_dpo_jax.huggingface.vocabulary import Enlargement, read_enlargement
from lora_dpo_jax.huggingface.weights import NOT_ENLARGED, load_model, read_config
from lora_dpo_jax.lora import LoraConfig, check_token_rows, loraize, trainable_filter, with_dropout
from lora_dpo_jax.models import CausalLM, DecoderConfig
from lora_dpo_jax.platforms import jitted
from lora_dpo_jax.runs.config import ModelConfig, TrainConfig
from lora_dpo_jax.sharding import Placement

logger = logging.getLogger("lora_dpo_jax")

TOKENIZER_FILES = ["*token*", "*.jinja", "*.model", "vocab*", "merges*", "config.json"]


@dataclass(frozen=True)
class Base:
    """The pretrained model, with its config and tokenizer."""

    name: str  # the value of initialize_from_hf
    revision: str | None  # the revision of that hub id
    folder: Path
    config: DecoderConfig
    model: CausalLM
    tokenizer: Any  # in training, with the chat template of the rows
    enlargement: Enlargement = NOT_ENLARGED  # of its vocabulary, by the given adapter


def check_models(config: TrainConfig) -> None:
    """Reads the settings of the base and of the given adapter before the data are read, so that errors come early."""
    settings = ["*config.json"]
    name, revision = config.initialize_from_hf, config.hf_revision
    folder = folder_of("initialize_from_hf", name, revision=revision, patterns=settings)
    lora = lora_config(config, patterns=settings)
    decoder = read_decoder(folder, config.model, lora)
    read_stop_ids(folder)
    if config.initialize_from_peft is None:
        check_token_rows(lora, tied=decoder.tie_word_embeddings, vocab_size=decoder.vocab_size)
    if config.gguf_save_path is not None:
        check_gguf(lora, folder)


def load_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer of `data.tokenizer`, or the base model's."""
    if config.data.tokenizer:
        folder = folder_of("data.tokenizer", config.data.tokenizer, patterns=TOKENIZER_FILES)
    else:
        name, revision = config.initialize_from_hf, config.hf_revision
        folder = folder_of("initialize_from_hf", name, revision=revision, patterns=TOKENIZER_FILES)
    try:
        return read_tokenizer(folder)
    except ValueError as error:
        raise ValueError(f"{error}. Fix it, or set data.tokenizer") from error


def load_base(config: TrainConfig, tokenizer: Any, placement: Placement, *, adapter: str | None = None) -> Base:
    """Reads the weights of `initialize_from_hf` to their devices, in the dtype that `config.model` asks for.

    Its vocabulary is that of initialize_from_peft, or else of `adapter`, if that was enlarged.
    """
    folder = folder_of("initialize_from_hf", config.initialize_from_hf, revision=config.hf_revision)
    lora = lora_config(config) if adapter is None else read_adapter_config(adapter_of("adapter", adapter))
    decoder = read_decoder(folder, config.model, lora)
    enlargement = NOT_ENLARGED
    for setting, name in (("adapter", adapter), ("initialize_from_peft", config.initialize_from_peft)):
        if name is not None:
            enlargement = read_enlargement(adapter_of(setting, name), folder, decoder) or enlargement
    decoder = enlargement.config(decoder)
    _check_lengths(config.train_seq_len, decoder)
    if len(tokenizer) > decoder.vocab_size:
        raise ValueError(
            f"the tokenizer knows {len(tokenizer)} tokens, but {config.initialize_from_hf} embeds only "
            f"{decoder.vocab_size}: set data.tokenizer to the model's own"
        )
    compute_dtype = config.trainer.precision.compute_dtype
    model = load_weights(folder, decoder, config.model, placement, compute_dtype=compute_dtype, enlargement=enlargement)
    return Base(config.initialize_from_hf, config.hf_revision, folder, decoder, model, tokenizer, enlargement)


def read_decoder(folder: Path, settings: ModelConfig, lora: LoraConfig) -> DecoderConfig:
    """The architecture in a folder, for a run with these settings."""
    decoder = read_config(folder, lora)
    if not settings.router_aux_loss_coef:
        return decoder
    if decoder.experts is None:
        raise ValueError(
            f"model.router_aux_loss_coef={settings.router_aux_loss_coef} is for models with experts, and {folder} has "
            "none: leave it out"
        )
    return dataclasses.replace(decoder, experts=dataclasses.replace(decoder.experts, reports_balance=True))


def load_weights(
    folder: Path,
    decoder: DecoderConfig,
    settings: ModelConfig,
    placement: Placement,
    *,
    compute_dtype: Any,
    enlargement: Enlargement = NOT_ENLARGED,
) -> CausalLM:
    """Reads the weights of a model's folder to their devices, held as `settings` ask."""
    with placement.scope():
        return load_model(
            folder,
            decoder,
            dtype=settings.weights_dtype(compute_dtype),
            compute=settings.compute,
            mapping=placement.parameters,
            quantization=settings.quantization,
            enlargement=enlargement,
        )


def lora_config(config: TrainConfig, **options: Any) -> LoraConfig:
    """The rank, scaling and targets of the given adapter if there is one, else those of `lora`."""
    if config.initialize_from_peft is None:
        return config.lora
    given = read_adapter_config(adapter_of("initialize_from_peft", config.initialize_from_peft, **options))
    return dataclasses.replace(given, dropout=config.lora.dropout)


def load_policy(config: TrainConfig, lora: LoraConfig, base: Base, placement: Placement, *, key) -> CausalLM:
    """The base with adapters, new or given, on their devices and in the dtype of `trainer.mp`."""
    dtype = config.trainer.precision.param_dtype
    if config.initialize_from_peft is None:
        return with_new_adapters(base.model, lora, placement, dtype=dtype, key=key)
    model = load_peft_adapter(base, "initialize_from_peft", config.initialize_from_peft, placement)
    return placed_adapters(with_dropout(model, lora.dropout), placement, dtype)


def with_new_adapters(base: CausalLM, lora: LoraConfig, placement: Placement, *, dtype: Any, key) -> CausalLM:
    """The model with new adapters on their devices, in `dtype`."""
    # One program, which compiles sooner than one for each draw. It returns the weights that it is given.
    policy = jitted(lambda base, key: loraize(base, lora, key=key))(base, key)
    return placed_adapters(policy, placement, dtype)


def load_peft_adapter(base: Base, setting: str, name: str, placement: Placement) -> CausalLM:
    """The base with the adapter of the folder, URL or hub id that `setting` names."""
    folder = adapter_of(setting, name)
    with placement.scope():
        return load_adapter(base.model, folder, mapping=placement.parameters, base_model=base.name)


def adapter_of(setting: str, name: str, **options: Any) -> Path:
    """The folder of an adapter, which may lie in the one that the setting names."""
    return adapter_folder(folder_of(setting, name, **options))


def folder_of(setting: str, name: str, **options: Any) -> Path:
    """`local_folder(name)`, whose error also names the setting."""
    try:
        return local_folder(name, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{setting}: {error}") from error


def placed_adapters(model: CausalLM, placement: Placement, dtype: Any) -> CausalLM:
    """The model with its adapters on their devices, in `dtype`."""
    adapters, weights = eqx.partition(model, trainable_filter(model))
    adapters = placement.put_parameters(jax.tree.map(lambda x: x.astype(dtype), adapters))
    return eqx.combine(adapters, weights)


def _check_lengths(train_seq_len: int, decoder: DecoderConfig) -> None:
    limit = decoder.max_position_embeddings
    if train_seq_len <= limit:
        return
    if decoder.rope.type == "dynamic":
        raise ValueError(
            f"train_seq_len={train_seq_len} is beyond max_position_embeddings={limit}, where dynamic rotary "
            "scaling depends on each sequence's length, so that two responses cannot share their prompt. "
            f"Set train_seq_len to at most {limit}."
        )
    logger.warning("train_seq_len=%d is beyond the model's max_position_embeddings=%d", train_seq_len, limit)
