"""Logs the parameters, pairs and steps of a run before its first step."""

import logging
from pathlib import Path

import equinox as eqx
import jax

from lora_dpo_jax.data.table import why_none_is_held_out
from lora_dpo_jax.lora import constant_filter, trainable_filter
from lora_dpo_jax.losses import Loss
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.models.quantization import parameter_count
from lora_dpo_jax.runs.assembly import Run
from lora_dpo_jax.training.loop import TrainerConfig

logger = logging.getLogger("lora_dpo_jax")


def announce(run: Run, loss: Loss, trainer: TrainerConfig, held_out_fraction: float, run_dir: Path) -> None:
    """Logs three lines, and the loss's warning. `held_out_fraction` is validation_split_fraction."""
    counts = parameter_counts(run.learner.state.model)
    logger.info(
        "%s: %s parameters, %s of them trainable (%.2f%%)",
        run.base.name,
        f"{counts['parameter_count']:,}",
        f"{counts['trainable_parameter_count']:,}",
        100 * counts["fraction_trainable"],
    )
    pairs, held_out = run.data.pairs, run.data.held_out
    why = "" if len(held_out) else f" ({why_none_is_held_out(pairs, held_out_fraction)})"
    noun = pairs.arrays.noun
    logger.info("%s training %s, %s held out%s", f"{len(pairs):,}", noun, f"{len(held_out):,}", why)
    logger.info(
        "%s, in micro-batches of %s tokens; run folder %s",
        _steps_in_words(trainer, run.order.epoch, len(run.steps), noun),
        " or ".join(f"{part.rows} x {part.row_length}" for part in run.steps.shapes.parts),
        run_dir,
    )
    if loss.warning is not None:
        logger.warning(loss.warning)


def parameter_counts(model: CausalLM) -> dict[str, float]:
    """The parameters of the base with its adapters, and of the adapters alone."""
    adapters, weights = eqx.partition(model, trainable_filter(model))
    weights = eqx.filter(weights, constant_filter(weights), inverse=True)
    trainable = sum(x.size for x in jax.tree.leaves(adapters))
    total = trainable + parameter_count(weights)
    return {
        "parameter_count": total,
        "trainable_parameter_count": trainable,
        "fraction_trainable": trainable / total,
    }


def _steps_in_words(trainer: TrainerConfig, epoch: int, num_steps: int, noun: str) -> str:
    """The number of steps and of their pairs, and how the run treats pairs that fill no whole batch."""
    size = trainer.train_batch_size
    text = f"{num_steps:,} steps of {size:,} {noun}"
    if trainer.has_short_batches and (left := epoch % size):
        return f"{text}, {-(-epoch // size):,} an epoch, whose last one has {left:,} (trainer.last_batch=short)"
    if trainer.num_train_steps is None and (trainer.num_train_epochs or 1) * epoch % size:
        return f"{text}, the last one filled up from the next epoch (trainer.last_batch=fill)"
    return text
