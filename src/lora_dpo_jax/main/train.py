"""LoRA-DPO: from a Hugging Face model and preference pairs to a PEFT adapter and a merged model."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import draccus
import numpy as np

from lora_dpo_jax.checkpoints.store import Checkpoints
from lora_dpo_jax.cost.devices import peak_flops
from lora_dpo_jax.data.preview import preview
from lora_dpo_jax.files import cache_folder
from lora_dpo_jax.generation import read_stop_ids
from lora_dpo_jax.huggingface.hub import check_hub, push_exports
from lora_dpo_jax.lora import reference_model
from lora_dpo_jax.platforms import compiles_beside_other_work
from lora_dpo_jax.processes.exchange import is_first_process
from lora_dpo_jax.processes.signals import StopSignals
from lora_dpo_jax.processes.stalls import StallMonitor
from lora_dpo_jax.runs.announcement import announce, parameter_counts
from lora_dpo_jax.runs.assembly import Run, assemble, load_data, pair_scorer, placement_of, reference_log_probs
from lora_dpo_jax.runs.base import check_models
from lora_dpo_jax.runs.best import BestAdapters, kept_like
from lora_dpo_jax.runs.checks import StepCheck, first_loss_tolerance, refuse_non_finite
from lora_dpo_jax.runs.compiled_programs import keep_compiled_programs
from lora_dpo_jax.runs.config import TrainConfig, resolved_settings, with_zero_init
from lora_dpo_jax.runs.exports import Exports, has_own_tokenizer
from lora_dpo_jax.runs.held_out import HeldOutScores
from lora_dpo_jax.runs.identity import refuse_other_settings, run_identity
from lora_dpo_jax.runs.outputs import check_outputs, exports_of
from lora_dpo_jax.runs.provenance import training_of
from lora_dpo_jax.runs.recording import Recorder, facts_of
from lora_dpo_jax.runs.reference_scores import ReferenceLogProbs
from lora_dpo_jax.runs.report import Samples, print_report
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
    check_hub(config.hub, config.initialize_from_hf)
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
    kept = kept_like(config.trainer, run.learner.state.model)
    first_step, notes, kept = restore(
        checkpoints, run.learner, len(run.steps), kept=kept, wanted=config.trainer.load_checkpoint
    )
    with _tracking(config, run, run_id, settings, first_step) as (tracker, earlier):
        reference = _reference(config, run)
        scorer = pair_scorer(run.data.held_out, trainer=config.trainer, placement=placement)
        scores = HeldOutScores(scorer, config.objective, reference, tracker, earlier, scored_by=config.scored_by)
        best = BestAdapters(config.trainer, len(run.steps), scores, notes, kept, tracker)
        stop_ids = read_stop_ids(run.base.folder)
        samples = Samples(
            config.sample_prompts, run.base.tokenizer, config.generation, stop_ids=stop_ids, scope=placement.scope
        )
        exports = _exports(config, run, run_id, settings, first_step, scores)
        known = _known_log_probs(reference, run.steps, notes)
        recorder = _recorder(config, run, run_id, scores, best, samples, first_step, began)
        hooks = _hooks(config, checkpoints, notes, scores, best, samples, exports, recorder)
        columns = config.loss.columns_in(run.data.pairs.arrays.columns)
        left = range(first_step, len(run.steps))
        batches = run.steps.batches(placement, steps=left, reference=known, columns=columns)
        with saying_how_to_resume(config.trainer, run_id), closing(batches), StopSignals() as stop, checkpoints:
            state = _train(config, run, batches, first_step, hooks, best, tracker, stop, began)
    report = None if recorder is None else recorder.finish()
    if is_first_process():
        _print_report(config, run_id, samples, scores, best, report)
    for name, url in push_exports(config.hub, config.export_paths).items():
        print(f"{f'hub.{name}':<14}{url}")
    return state


def _train(
    config: TrainConfig,
    run: Run,
    batches: Iterable[Any],
    first_step: int,
    hooks: Sequence[Hook],
    best: BestAdapters,
    tracker: Tracker,
    stop: StopSignals,
    began: float,
) -> TrainState:
    trainer, step = config.trainer, run.learner.step
    with run.learner.placement.scope():
        compile_step = step.compile if compiles_beside_other_work() else None
    return train(
        run.learner.state,
        step,
        batches,
        num_steps=len(run.steps),
        tracker=tracker,
        first_step=first_step,
        hooks=hooks,
        log_every=trainer.log_every,
        peak_flops=peak_flops(list(run.learner.placement.mesh.devices.flat)),
        check=_check(config, run, first_step),
        stop=stop,
        is_complete=best.is_complete,
        compile_step=compile_step,
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
    scores: HeldOutScores,
    best: BestAdapters,
    samples: Samples,
    exports: Exports,
    recorder: Recorder | None,
) -> list[Hook]:
    """The hooks between steps. Each checkpoint saves `notes` and the best adapters as they are at that time."""
    trainer = config.trainer

    def save(info: StepInfo[TrainState]) -> None:
        refuse_non_finite(info)
        checkpoints.save(info.step, info.state.trained, notes=notes, kept=best.adapters, is_last=info.is_last)

    def export(info: StepInfo[TrainState]) -> None:
        if info.is_last:
            exports(best.chosen(info), trained_for=best.standing.step, notes=best.words())
        else:
            exports(info)

    evaluations: Any = {"every": trainer.steps_per_eval, "at_start": trainer.eval_at_start}
    return [
        # First, and before each export, so that the state is safe if a later hook fails. A resumed run calls the later
        # hooks again.
        Hook(save, "checkpoint", every=config.hf_save_steps, when=checkpoints.is_due, at_stop=True),
        Hook(_evaluated(scores), "evaluation", **evaluations),
        Hook(_evaluated(best), "choice", **evaluations),
        Hook(_evaluated(lambda info: samples(best.chosen(info))), "sample_prompts", at_start=True),
        Hook(_evaluated(export), "export", every=config.hf_save_steps),
        *([Hook(_evaluated(recorder), "report", every=trainer.steps_per_eval, at_start=True)] if recorder else []),
    ]


def _evaluated(hook: Callable[[StepInfo[TrainState]], None]) -> Callable[[StepInfo[TrainState]], None]:
    """The hook, called with the adapters that are evaluated and exported: checkpoints alone hold those of the steps."""
    return lambda info: hook(dataclasses.replace(info, state=info.state.evaluated))


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


def _exports(
    config: TrainConfig,
    run: Run,
    run_id: str,
    settings: Mapping[str, Any],
    first_step: int,
    scores: HeldOutScores,
) -> Exports:
    data = run.data
    counts, noun = (len(data.pairs), len(data.held_out)), data.pairs.arrays.noun
    exports = Exports(
        exports_of(config),
        run.base,
        run.lora,
        run=run_id,
        overwrite=config.overwrite,
        num_steps=len(run.steps),
        has_own_tokenizer=has_own_tokenizer(config.data),
        peft_scaling=config.peft_scaling,
        training=training_of(config, settings, run.lora, run.base.folder, counts=counts, noun=noun),
        evaluations=lambda: scores.scores,
        repos=config.hub.repos,
    )
    exports.check_room(first_step, config.hf_save_steps)
    exports.check_layers(run.learner.state.model)
    return exports


def _recorder(
    config: TrainConfig,
    run: Run,
    run_id: str,
    scores: HeldOutScores,
    best: BestAdapters,
    samples: Samples,
    first_step: int,
    began: float,
) -> Recorder | None:
    """Keeps what report.html shows; None if none is asked for."""
    if not config.report:
        return None
    facts, run_dir = facts_of(run, config.preference_loss), config.trainer.run_dir(run_id)
    return Recorder(run_dir, facts, scores, best, samples, run.base.tokenizer, first_step=first_step, began=began)


def _print_report(
    config: TrainConfig,
    run_id: str,
    samples: Samples,
    scores: HeldOutScores,
    best: BestAdapters,
    report: Path | None,
) -> None:
    run_dir = config.trainer.run_dir(run_id)
    places = {
        "adapter": config.peft_save_path,
        "merged model": config.merged_hf_save_path,
        "GGUF": config.gguf_save_path,
        "metrics": run_dir / "metrics.jsonl",
        "config": run_dir / "config.yaml",
        "report": report,
    }
    print_report(samples, scores, places, chosen=best.standing.step, notes=best.words())
