"""LoRA-DPO: from a Hugging Face model and preference pairs to a PEFT adapter and a merged model."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import draccus
import numpy as np

from lora_dpo_jax.checkpoints.store import Checkpoints
from lora_dpo_jax.cost.devices import peak_flops
from lora_dpo_jax.data.preview import preview
from lora_dpo_jax.files import cache_folder
from lora_dpo_jax.generation import read_stop_ids
from lora_dpo_jax.lora import reference_model
from lora_dpo_jax.processes.exchange import is_first_process
from lora_dpo_jax.processes.signals import StopSignals
from lora_dpo_jax.processes.stalls import StallMonitor
from lora_dpo_jax.runs.announcement import announce, parameter_counts
from lora_dpo_jax.runs.assembly import Run, assemble, load_data, pair_scorer, placement_of, reference_log_probs
from lora_dpo_jax.runs.base import check_models
from lora_dpo_jax.runs.checks import StepCheck, first_loss_tolerance, refuse_non_finite
from lora_dpo_jax.runs.compiled_programs import keep_compiled_programs
from lora_dpo_jax.runs.config import TrainConfig, resolved_settings, with_zero_init
from lora_dpo_jax.runs.exports import Exports, has_own_tokenizer
from lora_dpo_jax.runs.identity import refuse_other_settings, run_identity
from lora_dpo_jax.runs.outputs import check_outputs, exports_of
from lora_dpo_jax.runs.reference_scores import ReferenceLogProbs
from lora_dpo_jax.runs.report import HeldOutScores, Samples, print_report
from lora_dpo_jax.runs.resuming import restore, run_locks, saying_how_to_resume
from lora_dpo_jax.runs.steps import Steps
from lora_dpo_jax.tracking import Tracker, cut_metrics, start_trackers
from lora_dpo_jax.training.loop import Hook, StepInfo, train
from lora_dpo_jax.training.step import TrainState

__all__ = ["TrainConfig", "main"]


def main(config: TrainConfig, *, began: float | None = None) -> TrainState | None:
    """Trains, evaluates and exports; returns the last state (None after a preview).

    `began` is the start of the command, as a time of time.perf_counter, if it was before this call.
    """
    began = time.perf_counter() if began is None else began
    config = with_zero_init(config)
    refuse_other_settings(config)
    if is_first_process():
        check_outputs(config)
    keep_compiled_programs(config.trainer.jax_compilation_cache_dir, cache_folder(config.data.cache_dir))
    if config.preview:
        return _preview(config)
    run_id = config.trainer.run_id()
    with run_locks(config.trainer, run_id):
        return _run(config, run_id, began)


def _run(config: TrainConfig, run_id: str, began: float) -> TrainState:
    check_models(config)
    placement = placement_of(config)  # missing devices are an error before the data are read
    for tracker in config.trainer.tracker:
        tracker.check_packages()
    run = assemble(config, placement)
    settings = resolved_settings(config, run_id)
    checkpoints = _checkpoints(config, run, run_id, settings)
    first_step, notes = restore(checkpoints, run.learner, len(run.steps), wanted=config.trainer.load_checkpoint)
    with _tracking(config, run, run_id, settings, first_step) as (tracker, earlier):
        reference = _reference(config, run)
        scorer = pair_scorer(run.data.held_out, trainer=config.trainer, placement=placement)
        scores = HeldOutScores(scorer, config.objective, reference, tracker, earlier)
        stop_ids = read_stop_ids(run.base.folder)
        samples = Samples(
            config.sample_prompts, run.base.tokenizer, config.generation, stop_ids=stop_ids, scope=placement.scope
        )
        exports = _exports(config, run, run_id, first_step)
        known = _known_log_probs(reference, run.steps, notes)
        hooks = _hooks(config, checkpoints, notes, len(run.steps), scores, samples, exports)
        columns = config.loss.columns_in(run.data.pairs.arrays.columns)
        left = range(first_step, len(run.steps))
        batches = run.steps.batches(placement, steps=left, reference=known, columns=columns)
        with saying_how_to_resume(config.trainer, run_id), closing(batches), StopSignals() as stop, checkpoints:
            state = _train(config, run, batches, first_step, hooks, tracker, stop, began)
    if is_first_process():
        _print_report(config, run_id, samples, scores)
    return state


def _train(
    config: TrainConfig,
    run: Run,
    batches: Iterable[Any],
    first_step: int,
    hooks: Sequence[Hook],
    tracker: Tracker,
    stop: StopSignals,
    began: float,
) -> TrainState:
    trainer = config.trainer
    return train(
        run.learner.state,
        run.learner.step,
        batches,
        num_steps=len(run.steps),
        tracker=tracker,
        first_step=first_step,
        hooks=hooks,
        log_every=trainer.log_every,
        peak_flops=peak_flops(list(run.learner.placement.mesh.devices.flat)),
        check=_check(config, run, first_step),
        stop=stop,
        began=began,
        stalls=StallMonitor(trainer.stall_seconds, helpers=("packing",)),
    )


def _check(config: TrainConfig, run: Run, first_step: int) -> StepCheck:
    trainer = config.trainer
    is_known = config.starts_equal and first_step == 0 and not config.model.router_aux_loss_coef
    return StepCheck(
        run.data.pairs,
        expected_first_loss=_loss_of_equal_models(config, run) if is_known else None,
        tolerance=first_loss_tolerance(),
        non_finite=trainer.non_finite,
        max_skips_in_a_row=trainer.max_skips_in_a_row,
    )


def _loss_of_equal_models(config: TrainConfig, run: Run) -> float | None:
    """The loss of step 0 if policy and reference are equal; None if it is not known."""
    batch = run.data.pairs.arrays.subset(run.steps.ids[0])
    return config.preference_loss.loss_where_equal(batch.examples)


def _hooks(
    config: TrainConfig,
    checkpoints: Checkpoints,
    notes: dict[str, Any],
    num_steps: int,
    scores: HeldOutScores,
    samples: Samples,
    exports: Exports,
) -> list[Hook]:
    """The hooks between steps. Each checkpoint saves `notes` as they are at that time."""
    trainer = config.trainer

    def save(info: StepInfo[TrainState]) -> None:
        refuse_non_finite(info)
        checkpoints.save(info.step, info.state.trained, notes=notes, is_last=info.step == num_steps)

    return [
        # First, and before each export, so that the state is safe if a later hook fails. A resumed run calls the later
        # hooks again.
        Hook(save, "checkpoint", every=config.hf_save_steps, when=checkpoints.is_due, at_stop=True),
        Hook(scores, "evaluation", every=trainer.steps_per_eval, at_start=trainer.eval_at_start),
        Hook(samples, "sample_prompts", at_start=True),
        Hook(exports, "export", every=config.hf_save_steps),
    ]


def _preview(config: TrainConfig) -> None:
    check_models(config)
    data = load_data(config)
    if is_first_process():
        preview(data.pairs, data.tokenizer, config.preview)


def _checkpoints(config: TrainConfig, run: Run, run_id: str, settings: Mapping[str, Any]) -> Checkpoints:
    checkpointer = config.trainer.checkpointer
    folder = checkpointer.folder(config.trainer.run_dir(run_id), run_id)
    identity = {}
    if is_first_process():
        identity = run_identity(config, run.lora, run.base, run.data.pairs, run.order)
    return Checkpoints(folder, checkpointer, identity=identity, settings=settings)


@contextmanager
def _tracking(
    config: TrainConfig, run: Run, run_id: str, settings: dict[str, Any], first_step: int
) -> Iterator[tuple[Tracker, list[dict[str, Any]]]]:
    """Logs metrics while the block runs. Yields (the tracker, the lines that a resumed run has logged so far)."""
    run_dir = config.trainer.run_dir(run_id)
    earlier = cut_metrics(run_dir, first_step)
    trackers = config.trainer.tracker
    with start_trackers(trackers, run_dir=run_dir, run_id=run_id, resolved_config=settings) as tracker:
        if is_first_process():
            dump: Any = draccus.dump
            # Not sorted: the order of the components is a part of the run.
            (run_dir / "config.yaml").write_text(str(dump(settings, sort_keys=False)))
        if first_step == 0:
            tracker.log_summary(parameter_counts(run.learner.state.model))
        announce(run, config.loss, config.trainer, config.held_out_fraction, run_dir)
        yield tracker, earlier


def _reference(config: TrainConfig, run: Run) -> ReferenceLogProbs | None:
    """The log-probs of the reference; None if the loss needs no reference."""
    if not config.loss.needs_reference:
        return None
    state = run.learner.state
    return reference_log_probs(config, run.base, reference_model(state.model, state.reference), run.learner.placement)


def _known_log_probs(reference: ReferenceLogProbs | None, steps: Steps, notes: dict[str, Any]) -> np.ndarray | None:
    """The reference's log-probs, float32 [response]. None: each step computes them. A resumed run obeys `notes`."""
    known = None
    if reference is not None:
        known = reference.of_steps(steps, choice=notes.get("reference_log_probs", "auto"))
    notes["reference_log_probs"] = "live" if known is None else "cached"
    return known


def _exports(config: TrainConfig, run: Run, run_id: str, first_step: int) -> Exports:
    exports = Exports(
        exports_of(config),
        run.base,
        run.lora,
        run=run_id,
        overwrite=config.overwrite,
        num_steps=len(run.steps),
        has_own_tokenizer=has_own_tokenizer(config.data),
        peft_scaling=config.peft_scaling,
    )
    exports.check_room(first_step, config.hf_save_steps)
    exports.check_layers(run.learner.state.model)
    return exports


def _print_report(config: TrainConfig, run_id: str, samples: Samples, scores: HeldOutScores) -> None:
    run_dir = config.trainer.run_dir(run_id)
    places = {
        "adapter": config.peft_save_path,
        "merged model": config.merged_hf_save_path,
        "GGUF": config.gguf_save_path,
        "metrics": run_dir / "metrics.jsonl",
        "config": run_dir / "config.yaml",
    }
    print_report(samples, scores, places)
