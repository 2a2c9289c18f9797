"""How a run made its exports: its data and the settings that decide what is learned, for their cards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import draccus

from lora_dpo_jax.data.sources import SourceConfig
from lora_dpo_jax.huggingface.card import DataSource, Training, license_in, public_name
from lora_dpo_jax.lora import LoraConfig
from lora_dpo_jax.runs.config import TrainConfig

TOLD = {
    "train_seq_len": None,
    "loss": None,
    "optimizer": None,
    "lora": None,
    "model": ("dtype", "quantization", "router_aux_loss_coef"),
    "trainer": ("num_train_steps", "num_train_epochs", "train_batch_size", "last_batch", "mp", "seed"),
    "reference_sync": None,
    "data": ("shuffle", "train_weights"),
    "validation_split_fraction": None,
}


def training_of(
    config: TrainConfig,
    settings: Mapping[str, Any],
    lora: LoraConfig,
    base_folder: Path,
    *,
    counts: tuple[int, int],
    noun: str,
) -> Training:
    """`settings` are the resolved ones, without secrets; `counts` those of training examples and held-out ones."""
    loss, encode = config.preference_loss, draccus.encode
    settings = {**settings, "lora": encode(lora)}  # pyright: ignore[reportArgumentType]
    start = config.initialize_from_peft
    return Training(
        loss=loss.get_choice_name(type(loss)),
        method=loss.hub_tag,
        noun=noun,
        counts=counts,
        sources=[_described(name, component.source) for name, component in config.data.components.items()],
        settings=_told(settings),
        start=None if start is None else public_name(start),
        license=license_in(base_folder),
    )


def _described(name: str, source: SourceConfig) -> DataSource:
    places = dict.fromkeys([*source.places("train"), *source.places("validation")])
    return DataSource(name, [public_name(place) for place in places], source.hub_id)


def _told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of TOLD, without those that are off."""
    told: dict[str, Any] = {}
    for name, parts in TOLD.items():
        value = settings[name]
        if isinstance(value, Mapping):
            value = {key: x for key, x in value.items() if (parts is None or key in parts) and _is_on(x)}
        if _is_on(value):
            told[name] = value
    return told


def _is_on(value: Any) -> bool:
    return value is not None and value is not False and value != [] and value != {}
