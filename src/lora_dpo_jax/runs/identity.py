"""The identity of a run: the weights that it starts from, the pairs that it trains on, and their order."""

import dataclasses
import json
from typing import Any

import draccus
import equinox as eqx
import jax
import jax.numpy as jnp

import lora_dpo_jax
from lora_dpo_jax.checkpoints.differences import flat_settings
from lora_dpo_jax.data.order import MIXING, ExampleOrder
from lora_dpo_jax.data.table import ExampleSource, ExampleTable
from lora_dpo_jax.files import cache_folder
from lora_dpo_jax.huggingface.digests import tensor_digests
from lora_dpo_jax.lora import LoraConfig, trainable_filter
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.processes.exchange import refuse_differences
from lora_dpo_jax.runs.base import Base, adapter_of
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.runs.steps import Steps

# Settings of `lora` without which the adapters of a checkpoint mean nothing.
SHAPE_ADAPTERS = ("r", "alpha", "use_rslora", "target_modules", "exclude_modules")
# The same, but left out if unset, because checkpoints of earlier versions lack them.
SHAPE_ADAPTERS_IF_SET = ("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern")
SHAPE_ADAPTERS_IF_SET += ("trainable_token_indices", "target_parameters")
# Settings of `model` that change how log-probs are computed, not their values; the dtype is taken from the arrays.
CHANGE_NO_NUMBERS = ("gradient_checkpointing", "attention", "dtype", "router_aux_loss_coef")


def weights_identity(config: TrainConfig, base: Base) -> dict[str, Any]:
    """Configs and digests of the base's files, and of those of the reference's adapter if there is one."""
    memory = cache_folder(config.data.cache_dir) / "digests"
    adapter = None
    if config.reference_adapter is not None:
        folder = adapter_of("initialize_from_peft", config.reference_adapter)
        adapter = {
            "adapter_config.json": json.loads((folder / "adapter_config.json").read_text()),
            "files": tensor_digests(folder, "adapter_model", memory=memory),
        }
    enlarged_by = base.enlargement.adapter
    return {
        **({"vocabulary": tensor_digests(enlarged_by, "adapter_model", memory=memory)} if enlarged_by else {}),
        "config.json": json.loads((base.folder / "config.json").read_text()),
        "files": tensor_digests(base.folder, memory=memory),
        "adapter": adapter,
    }


def reference_identity(config: TrainConfig, base: Base, reference: CausalLM) -> dict[str, Any]:
    """Everything, except the pairs, that decides the log-probs of `reference`: no loss, no optimizer, no layout."""
    settings = dataclasses.asdict(config.model)
    adapters, weights = eqx.partition(reference, trainable_filter(reference))
    return {
        **weights_identity(config, base),
        "model": {name: value for name, value in settings.items() if name not in CHANGE_NO_NUMBERS},
        "dtypes": [dtypes_of(tree) for tree in (weights, adapters)],
        "compute_dtype": str(jnp.dtype(config.trainer.precision.compute_dtype)),
        "platform": jax.default_backend(),
        "matmul_precision": jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
    }


def run_identity(
    config: TrainConfig, lora: LoraConfig, base: Base, pairs: ExampleTable, order: ExampleOrder
) -> dict[str, Any]:
    """Everything that a run must share with a checkpoint to resume from it, by the names of the settings.

    How the run is computed or reported is left out, and so are the settings of loss and optimizer: they may change. But
    the optimizer's type may not, because another type has another state.
    """
    weights = weights_identity(config, base)
    adapter = weights.pop("adapter")
    trainer, optimizer = config.trainer, config.optimizer.get_choice_name(type(config.optimizer))
    # Left out if it changes no batch, because checkpoints of earlier versions lack it.
    has_short_batches = trainer.has_short_batches and order.epoch % trainer.train_batch_size
    components = {
        name: {"pairs": len(component), **component.checksums} for name, component in _components(pairs).items()
    }
    return {
        "initialize_from_hf": weights,
        "initialize_from_peft": adapter,
        "peft_reference": config.peft_reference if config.initialize_from_peft else None,
        # Left out otherwise, because checkpoints of earlier versions lack it. Its settings may change.
        **({"reference_sync": "moves the reference"} if config.reference_sync.moves else {}),
        **({} if optimizer == "adamw" else {"optimizer": {"type": optimizer}}),  # left out likewise
        "model": {"dtype": dtypes_of(base.model), "quantization": config.model.quantization},
        "lora": {
            name: value
            for name, value in dataclasses.asdict(lora).items()
            if name in SHAPE_ADAPTERS
            or (name in SHAPE_ADAPTERS_IF_SET and value)
            or (name == "a_init" and lora.starts_at_factors)
        },
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
    """Raises ValueError unless all processes have the same settings and versions. All must call this."""
    settings = flat_settings(draccus.encode(config))  # pyright: ignore[reportArgumentType]
    refuse_differences(
        {name: value for name, value in settings.items() if not name.startswith("trainer.distributed.")}
        | {"lora_dpo_jax": lora_dpo_jax.__version__, "jax": jax.__version__}
    )


def refuse_other_steps(steps: Steps) -> None:
    """Raises ValueError unless all processes have the same pairs and the same steps."""
    refuse_differences(
        {f"data.components.{name}": component.checksums for name, component in _components(steps.pairs).items()}
        | {"the pairs of the steps": repr(steps.ids)}  # a few numbers, of which all ids are a function
        | {"the shapes of the batches": repr(steps.shapes)}
    )


def _components(pairs: ExampleTable) -> dict[str, ExampleSource]:
    return {name: component for name, (component, _) in zip(pairs.names, pairs.components, strict=True)}


def dtypes_of(tree: Any) -> list[str]:
    return sorted({str(leaf.dtype) for leaf in jax.tree.leaves(tree)})
