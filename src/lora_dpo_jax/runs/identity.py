"""What tells one run from another: the weights it starts from, the pairs it trains on, and in which order."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import draccus
import jax
import numpy as np

import lora_dpo_jax
from lora_dpo_jax.checkpoints.store import flat_settings
from lora_dpo_jax.data.batches import PairSource, PairTable
from lora_dpo_jax.data.config import default_cache_dir
from lora_dpo_jax.data.order import MIXING, PairOrder
from lora_dpo_jax.data.shapes import RunLayout
from lora_dpo_jax.huggingface.digests import tensor_digests
from lora_dpo_jax.lora import LoraConfig
from lora_dpo_jax.processes.exchange import refuse_differences
from lora_dpo_jax.runs.setup import Base, TrainConfig, folder_of

# Settings of `lora` that a checkpoint's adapters mean nothing without.
SHAPE_ADAPTERS = ("r", "alpha", "use_rslora", "target_modules", "exclude_modules")


def weights_identity(config: TrainConfig, base: Base) -> dict[str, Any]:
    """Of the base, and of the adapter that is its reference if there is one: what their files hold."""
    memory = cache_folder(config) / "digests"
    adapter = None
    if config.reference_adapter is not None:
        folder = folder_of("initialize_from_peft", config.reference_adapter)
        adapter = {
            "adapter_config.json": json.loads((folder / "adapter_config.json").read_text()),
            "files": tensor_digests(folder, "adapter_model", memory=memory),
        }
    return {
        "config.json": json.loads((base.folder / "config.json").read_text()),
        "files": tensor_digests(base.folder, memory=memory),
        "adapter": adapter,
    }


def run_identity(
    config: TrainConfig, lora: LoraConfig, base: Base, pairs: PairTable, order: PairOrder
) -> dict[str, Any]:
    """By the names of the settings, all that a run must share with a checkpoint to go on from it.

    Nothing of how the run is computed or reported, or of the loss and the optimizer's settings, which may be changed on
    the way.
    """
    weights = weights_identity(config, base)
    adapter = weights.pop("adapter")
    trainer = config.trainer
    # Left out where it changes no batch: checkpoints of before it was there say nothing of it.
    has_short_batches = trainer.has_short_batches and order.epoch % trainer.train_batch_size
    components = {
        name: {"pairs": len(component), **component.checksums} for name, component in _components(pairs).items()
    }
    return {
        "initialize_from_hf": weights,
        "initialize_from_peft": adapter,
        "peft_reference": config.peft_reference if config.initialize_from_peft else None,
        "model": {"dtype": dtypes_of(base.model), "quantization": config.model.quantization},
        "lora": {name: value for name, value in dataclasses.asdict(lora).items() if name in SHAPE_ADAPTERS},
        "data": {
            "components": components,
            "order_of_components": pairs.names,
            "shuffle": config.data.shuffle,
            "train_weights": config.data.train_weights,
            **({"version_of_mixing": MIXING} if config.data.train_weights is not None else {}),
            "training_pairs": len(pairs),
        },
        "validation_split_fraction": config.held_out_fraction,
        "trainer": {
            "seed": trainer.seed,
            "train_batch_size": trainer.train_batch_size,
            **({"last_batch": "short"} if has_short_batches else {}),
        },
    }


def refuse_other_settings(config: TrainConfig) -> None:
    """Raises ValueError unless all processes of the run were started alike; all must call this."""
    settings = flat_settings(draccus.encode(config))  # pyright: ignore[reportArgumentType]
    refuse_differences(
        {name: value for name, value in settings.items() if not name.startswith("trainer.distributed.")}
        | {"lora_dpo_jax": lora_dpo_jax.__version__, "jax": jax.__version__}
    )


def refuse_other_plans(pairs: PairTable, batch_ids: Sequence[np.ndarray], layout: RunLayout) -> None:
    """Raises ValueError unless all processes have the same pairs, and the same steps to make of them."""
    refuse_differences(
        {f"data.components.{name}": component.checksums for name, component in _components(pairs).items()}
        | {"the pairs of the steps": hashlib.sha256(np.concatenate(batch_ids).tobytes()).hexdigest()}
        | {"the shapes of the batches": repr(layout)}
    )


def _components(pairs: PairTable) -> dict[str, PairSource]:
    return {name: component for name, (component, _) in zip(pairs.names, pairs.components, strict=True)}


def dtypes_of(tree: Any) -> list[str]:
    return sorted({str(leaf.dtype) for leaf in jax.tree.leaves(tree)})


def cache_folder(config: TrainConfig) -> Path:
    return Path(config.data.cache_dir or default_cache_dir()).expanduser()
