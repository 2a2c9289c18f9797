"""LoRA-DPO: from a Hugging Face model and preference pairs to a PEFT adapter and a merged checkpoint."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import draccus
import equinox as eqx
import jax
import numpy as np

from lora_dpo_jax.checkpoints.store import Checkpoints
from lora_dpo_jax.cost.devices import peak_flops
from lora_dpo_jax.data.batches import PairTable, packed_batches, why_none_is_held_out
from lora_dpo_jax.data.order import PairOrder
from lora_dpo_jax.data.preview import preview
from lora_dpo_jax.data.shapes import RunLayout
from lora_dpo_jax.huggingface.adapters import read_adapter_config
from lora_dpo_jax.lora import LoraConfig, frozen_copy, loraize, reference_model, trainable_filter, with_dropout
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.models.quantization import parameter_count
from lora_dpo_jax.places import is_within
from lora_dpo_jax.processes.exchange import is_first_process
from lora_dpo_jax.processes.run_lock import RunLock
from lora_dpo_jax.processes.signals import InterruptedTrainingError, StopSignals
from lora_dpo_jax.processes.stalls import Watch
from lora_dpo_jax.redaction import redacted
from lora_dpo_jax.runs.checks import Guard, refuse_non_finite
from lora_dpo_jax.runs.exports import Exports, with_trained_template
from lora_dpo_jax.runs.identity import refuse_other_plans, refuse_other_settings, run_identity
from lora_dpo_jax.runs.outputs import check_outputs
from lora_dpo_jax.runs.reference_scores import ReferenceLogProbs
from lora_dpo_jax.runs.report import Report
from lora_dpo_jax.runs.setup import (
    Base,
    TrainConfig,
    check_models,
    folder_of,
    keep_programs,
    layout_of_run,
    load_base,
    load_peft_adapter,
    load_tables,
    load_tokenizer,
    placement_of,
    scorer,
)
from lora_dpo_jax.sharding import Placement
from lora_dpo_jax.tracking import cut_metrics, start_trackers
from lora_dpo_jax.training.loop import Hook, StepInfo, TrainerConfig, train
from lora_dpo_jax.training.step import TrainState, TrainStep

logger = logging.getLogger("lora_dpo_jax")

__all__ = ["TrainConfig", "main"]


def main(config: TrainConfig, *, began: float | None = None) -> TrainState | None:
    """Trains, evaluates and exports; returns the last state (None after a preview).

    `began`, of time.perf_counter, is when the command was given, if that was before this call.
    """
    began = time.perf_counter() if began is None else began
    config = _with_zero_init(config)
    refuse_other_settings(config)
    if is_first_process():
        check_outputs(config)
    keep_programs(config)
    run_id = config.trainer.run_id()
    with _run_locks(config, run_id):
        return _run(config, run_id, began)


@contextmanager
def _run_locks(config: TrainConfig, run_id: str) -> Iterator[None]:
    """Around a run: no other one works in its folder, nor in that of its checkpoints."""
    run_dir = config.trainer.run_dir(run_id)
    checkpoints = config.trainer.checkpointer.folder(run_dir, run_id)
    with ExitStack() as locks:
        if is_first_process() and not config.preview:
            locks.enter_context(RunLock(run_dir, run_id))
            if not is_within(str(checkpoints), run_dir):
                locks.enter_context(RunLock(checkpoints, run_id))
        yield


def _run(config: TrainConfig, run_id: str, began: float) -> TrainState | None:
    check_models(config)
    if not config.preview:  # What cannot be on this machine is an error before the data are read.
        placement_of(config)
        for tracker in config.trainer.tracker:
            tracker.check_packages()
    lora = _lora_config(config)
    tokenizer = load_tokenizer(config)
    pairs, held_out = load_tables(config, tokenizer)
    if config.preview:
        if is_first_process():
            preview(pairs, tokenizer, config.preview)
        return None
    if not len(pairs):
        raise ValueError("data.components: no training pair is left; see the counts above")

    trainer = config.trainer
    placement = placement_of(config)
    base = load_base(config, with_trained_template(config, tokenizer), placement)
    k_adapters, k_dropout = jax.random.split(jax.random.key(trainer.seed))
    model = _adapted(config, lora, base, placement, key=k_adapters)

    order = _order(config, pairs)
    num_steps = trainer.steps(order.epoch)
    optimizer, schedule = config.optimizer.build(num_steps), config.optimizer.schedule(num_steps)
    reference = frozen_copy(model) if config.reference_adapter is not None else None
    state = placement.put_parameters(TrainState.init(model, optimizer, key=k_dropout, reference=reference))
    step = TrainStep(config.preference_loss, optimizer, schedule=schedule, scope=placement.scope)

    batch_ids, layout = _plan(config, pairs, order, num_steps, placement)

    run_dir = trainer.run_dir(run_id)
    resolved = _resolved(config, run_id)
    checkpoints = Checkpoints(
        trainer.checkpointer.folder(run_dir, run_id),
        trainer.checkpointer,
        identity=run_identity(config, lora, base, pairs, order) if is_first_process() else {},
        settings=resolved,
    )
    state, first_step, notes = _restore(checkpoints, state, num_steps, wanted=trainer.load_checkpoint)
    earlier = cut_metrics(run_dir, first_step)
    with start_trackers(trainer.tracker, run_dir=run_dir, run_id=run_id, resolved_config=resolved) as tracker:
        if is_first_process():
            # Not sorted: the order of the components is a part of the run.
            (run_dir / "config.yaml").write_text(str(draccus.dump(resolved, sort_keys=False)))
        if first_step == 0:
            tracker.log_summary(_parameter_counts(model))
        _announce(config, pairs, held_out, order, model, num_steps, layout, run_dir)
        starts_equal = config.initialize_from_peft is None or config.reference_adapter is not None
        log_probs = None
        if not config.loss.reference_free:
            log_probs = ReferenceLogProbs(config, base, reference_model(model, reference), placement)
        report = Report(config, base, tracker, scorer(config, held_out, placement), log_probs, earlier)
        exports = Exports(config, lora, base, num_steps, first_step, run=run_id)

        hooks = _hooks(config, checkpoints, notes, report, exports, num_steps)
        known = None
        if log_probs is not None:
            known = log_probs.of_steps(pairs, batch_ids, choice=notes.get("reference_log_probs", "auto"))
        notes["reference_log_probs"] = "live" if known is None else "cached"
        left = batch_ids[first_step:]
        batches = packed_batches(pairs, left, layout, place=placement.put_batch, reference=known)
        with _saying_how_to_resume(config, run_id), closing(batches), StopSignals() as stop, checkpoints:
            state = train(
                state,
                step,
                batches,
                num_steps=num_steps,
                tracker=tracker,
                first_step=first_step,
                hooks=hooks,
                log_every=trainer.log_every,
                peak_flops=peak_flops(list(placement.mesh.devices.flat)),
                check=Guard(config, pairs, starts_equal),
                stop=stop,
                began=began,
                watch=Watch(trainer.stall_seconds, helpers=("packing",)),
            )
    if is_first_process():
        report.print(run_dir)
    return state


def _hooks(
    config: TrainConfig, checkpoints: Checkpoints, notes: dict, report: Report, exports: Exports, num_steps: int
) -> list[Hook]:
    """What happens between steps. `notes` are saved with each checkpoint, as they are then."""
    trainer = config.trainer

    def save(info: StepInfo[TrainState]) -> None:
        refuse_non_finite(info)
        checkpoints.save(info.step, info.state.trained, notes=notes, is_last=info.step == num_steps)

    return [
        # First, and before each export, so that the state is safe when a later one fails; a resumed run calls those
        # again.
        Hook(save, "checkpoint", every=config.hf_save_steps, when=checkpoints.is_due, at_stop=True),
        Hook(report.evaluate, "evaluation", every=trainer.steps_per_eval, at_start=trainer.eval_at_start),
        Hook(report.sample, "sample_prompts", at_start=True),
        Hook(exports, "export", every=config.hf_save_steps),
    ]


def _order(config: TrainConfig, pairs: PairTable) -> PairOrder:
    weights = config.data.train_weights
    if weights is None:
        return PairOrder(tuple(pairs.sizes), config.trainer.seed, config.data.shuffle)
    for name, size in zip(pairs.names, pairs.sizes, strict=True):
        if weights[name] > 0 and size == 0:
            raise ValueError(
                f"data.train_weights.{name}={weights[name]}, but all pairs of {name} are held out: lower "
                "validation_split_fraction, give a component validation data, or set this weight to 0"
            )
    of_components = tuple(weights[name] for name in pairs.names)
    return PairOrder(tuple(pairs.sizes), config.trainer.seed, config.data.shuffle, of_components)


def _resolved(config: TrainConfig, run_id: str) -> Any:
    """The settings, without secrets, that make this run anew: with one beta, and the id that resumes it."""
    trainer = dataclasses.replace(config.trainer, id=run_id)
    encode: Any = draccus.encode
    tree = encode(dataclasses.replace(config, loss=config.preference_loss, beta=None, trainer=trainer))
    del tree["beta"]
    return redacted(tree)


@contextmanager
def _saying_how_to_resume(config: TrainConfig, run_id: str) -> Iterator[None]:
    """Around training: gives an interruption the settings with which the same command resumes the run."""
    try:
        yield
    except InterruptedTrainingError as interruption:
        if config.trainer.id is None:
            interruption.resume_with += ["--trainer.id", run_id]
        if config.trainer.load_checkpoint is False:
            interruption.resume_with += ["--trainer.load_checkpoint", "true"]
        raise


def _plan(
    config: TrainConfig, pairs: PairTable, order: PairOrder, num_steps: int, placement: Placement
) -> tuple[list[np.ndarray], RunLayout]:
    """The ids of the pairs of each step, and how they are laid into rows; the same on every process."""
    trainer = config.trainer
    size, short_ends = trainer.train_batch_size, trainer.has_short_batches
    batch_ids = [order.batch(step, size, short_ends=short_ends) for step in range(num_steps)]
    parallelism = trainer.per_device_parallelism
    layout = layout_of_run(pairs, batch_ids, parallelism, config.layout, row_shards=placement.row_shards)
    refuse_other_plans(pairs, batch_ids, layout)
    return batch_ids, layout


def _restore(
    checkpoints: Checkpoints, state: TrainState, num_steps: int, *, wanted: bool | None
) -> tuple[TrainState, int, dict[str, Any]]:
    """The state to begin with, its step, and what was noted with it: of the newest checkpoint if there is one."""
    found = checkpoints.restore(state.trained, wanted=wanted)
    if found is None:
        return state, 0, {}
    if found.step > num_steps:
        raise ValueError(
            f"{checkpoints.folder} holds a checkpoint of step {found.step}, but the run has only {num_steps} steps: "
            "raise trainer.num_train_steps or num_train_epochs, or choose another trainer.id"
        )
    return state.with_trained(found.arrays), found.step, found.notes


def _with_zero_init(config: TrainConfig) -> TrainConfig:
    if config.lora.zero_init_b:
        return config
    logger.warning("lora.zero_init_b=false would start away from the reference; it is set to true")
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, zero_init_b=True))


def _lora_config(config: TrainConfig) -> LoraConfig:
    """That of the given adapter, if there is one: its rank and scaling are no choice of ours."""
    if config.initialize_from_peft is None:
        return config.lora
    given = read_adapter_config(folder_of("initialize_from_peft", config.initialize_from_peft))
    return dataclasses.replace(given, dropout=config.lora.dropout)


def _adapted(config: TrainConfig, lora: LoraConfig, base: Base, placement: Placement, *, key) -> CausalLM:
    """The base with adapters, new or given, on their devices and in the dtype of `trainer.mp`."""
    if config.initialize_from_peft is None:
        model = loraize(base.model, lora, key=key)
    else:
        folder = folder_of("initialize_from_peft", config.initialize_from_peft)
        model = load_peft_adapter(base.model, folder, placement, base_model=config.initialize_from_hf)
        model = with_dropout(model, lora.dropout)
    adapters, weights = eqx.partition(model, trainable_filter(model))
    dtype = config.trainer.precision.param_dtype
    adapters = placement.put_parameters(jax.tree.map(lambda x: x.astype(dtype), adapters))
    return eqx.combine(adapters, weights)


def _parameter_counts(model: CausalLM) -> dict[str, float]:
    """Of the base, and of the adapters."""
    adapters, weights = eqx.partition(model, trainable_filter(model))
    trainable = sum(x.size for x in jax.tree.leaves(adapters))
    total = trainable + parameter_count(weights)
    return {
        "parameter_count": total,
        "trainable_parameter_count": trainable,
        "fraction_trainable": trainable / total,
    }


def _announce(config, pairs, held_out, order, model, num_steps, layout, run_dir) -> None:
    counts = _parameter_counts(model)
    logger.info(
        "%s: %s parameters, %s of them trainable (%.2f%%)",
        config.initialize_from_hf,
        f"{counts['parameter_count']:,}",
        f"{counts['trainable_parameter_count']:,}",
        100 * counts["fraction_trainable"],
    )
    why = "" if len(held_out) else f" ({why_none_is_held_out(pairs, config.held_out_fraction)})"
    logger.info("%s training pairs, %s held out%s", f"{len(pairs):,}", f"{len(held_out):,}", why)
    logger.info(
        "%s, in micro-batches of %s tokens; run folder %s",
        _steps_in_words(config.trainer, order, num_steps),
        " or ".join(f"{part.rows} x {part.row_length}" for part in layout.parts),
        run_dir,
    )


def _steps_in_words(trainer: TrainerConfig, order: PairOrder, num_steps: int) -> str:
    """How many steps of how many pairs, and what becomes of pairs that make no whole batch."""
    size, epoch = trainer.train_batch_size, order.epoch
    text = f"{num_steps:,} steps of {size:,} pairs"
    if trainer.has_short_batches and (left := epoch % size):
        return f"{text}, {-(-epoch // size):,} an epoch, whose last one has {left:,} (trainer.last_batch=short)"
    if trainer.num_train_steps is None and (trainer.num_train_epochs or 1) * epoch % size:
        return f"{text}, the last one filled up from the next epoch (trainer.last_batch=fill)"
    return text
