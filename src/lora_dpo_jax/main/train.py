"""LoRA-DPO: from a Hugging Face model and preference pairs to a PEFT adapter and a merged checkpoint."""

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any

import draccus
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from lora_dpo_jax.data.loader import PairOrder, PairTable, packed_batches
from lora_dpo_jax.data.planning import plan_layout
from lora_dpo_jax.data.preview import preview
from lora_dpo_jax.evaluation import PairScorer, summarize
from lora_dpo_jax.generation import complete, read_stop_ids
from lora_dpo_jax.huggingface.adapters import read_adapter_config, save_adapter
from lora_dpo_jax.huggingface.folders import check_export_target
from lora_dpo_jax.huggingface.weights import save_merged
from lora_dpo_jax.lora import LoraConfig, frozen_copy, loraize, reference_model, trainable_filter, with_dropout
from lora_dpo_jax.losses import PairLogProbs
from lora_dpo_jax.main.identity import refuse_other_plans, refuse_other_settings, run_identity
from lora_dpo_jax.main.reference import ReferenceLogProbs
from lora_dpo_jax.main.setup import (
    Base,
    TrainConfig,
    folder_of,
    keep_programs,
    load_base,
    load_peft_adapter,
    load_tables,
    load_tokenizer,
    longest_row,
    scorer,
)
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.models.quantization import parameter_count
from lora_dpo_jax.sharding import Placement, on_host
from lora_dpo_jax.tracking import Tracker, cut_metrics, start_trackers
from lora_dpo_jax.training.checkpoint import Checkpoints
from lora_dpo_jax.training.devices import peak_flops
from lora_dpo_jax.training.distributed import is_first_process
from lora_dpo_jax.training.interruption import StopSignals
from lora_dpo_jax.training.step import StepMetrics, TrainState, TrainStep
from lora_dpo_jax.training.trainer import Hook, NonFiniteLossError, StepInfo, train

logger = logging.getLogger("lora_dpo_jax")

__all__ = ["TrainConfig", "main"]


def main(config: TrainConfig, *, began: float | None = None) -> TrainState | None:
    """Trains, evaluates and exports; returns the last state (None after a preview).

    `began`, of time.perf_counter, is when the command was given, if that was before this call.
    """
    began = time.perf_counter() if began is None else began
    config = _with_zero_init(config)
    refuse_other_settings(config)
    keep_programs(config)
    tokenizer = load_tokenizer(config)
    pairs, held_out = load_tables(config, tokenizer)
    if config.preview:
        if is_first_process():
            preview(pairs, tokenizer, config.preview)
        return None
    if not len(pairs):
        raise ValueError("data.components: no training pair is left; see the counts above")

    trainer = config.trainer
    placement = Placement(trainer.mesh)
    base = load_base(config, tokenizer, placement)
    lora = _lora_config(config)
    k_adapters, k_dropout = jax.random.split(jax.random.key(trainer.seed))
    model = _adapted(config, lora, base, placement, key=k_adapters)

    num_steps = trainer.steps(len(pairs))
    optimizer, schedule = config.optimizer.build(num_steps), config.optimizer.schedule(num_steps)
    reference = frozen_copy(model) if config.reference_adapter is not None else None
    state = placement.put_parameters(TrainState.init(model, optimizer, key=k_dropout, reference=reference))
    step = TrainStep(config.preference_loss, optimizer, schedule=schedule, scope=placement.scope)

    order = PairOrder(tuple(pairs.sizes), trainer.seed, config.data.shuffle, _weights(config, pairs))
    batch_ids = [order.batch(n, trainer.train_batch_size) for n in range(num_steps)]
    layout = plan_layout(
        batch_ids,
        pairs.lengths,
        row_multiple=placement.row_shards,
        longest_row=longest_row(trainer.per_device_parallelism, config.layout, pairs),
        pair_layout=config.layout,
    )

    refuse_other_plans(pairs, batch_ids, layout)

    run_id = trainer.run_id()
    run_dir = trainer.run_dir(run_id)
    resolved: Any = draccus.encode(config)
    checkpoints = Checkpoints(
        trainer.checkpointer.folder(run_dir, run_id),
        trainer.checkpointer,
        identity=run_identity(config, lora, base, pairs) if is_first_process() else {},
        settings=resolved,
    )
    state, first_step, notes = _restore(checkpoints, state, num_steps, wanted=trainer.load_checkpoint)
    earlier = cut_metrics(run_dir, first_step)
    with start_trackers(trainer.tracker, run_dir=run_dir, run_id=run_id, resolved_config=resolved) as tracker:
        if is_first_process():
            (run_dir / "config.yaml").write_text(str(draccus.dump(config)))
        if first_step == 0:
            tracker.log_summary(_parameter_counts(model))
        _announce(config, pairs, held_out, model, num_steps, layout, run_dir)
        starts_equal = config.initialize_from_peft is None or config.reference_adapter is not None
        log_probs = None
        if not config.loss.reference_free:
            log_probs = ReferenceLogProbs(config, base, reference_model(model, reference), placement)
        report = _Report(config, base, tracker, scorer(config, held_out, placement), log_probs, starts_equal, earlier)
        guard = _Guard(config, pairs, starts_equal)

        def save(info: StepInfo[TrainState]) -> None:
            checkpoints.save(info.step, info.state.trained, notes=notes, is_last=info.step == num_steps)

        hooks = [
            # First, so that the state is safe when a later one fails; those are called again by a run that goes on.
            Hook(save, when=checkpoints.is_due, at_stop=True),
            Hook(report.evaluate, every=trainer.steps_per_eval, at_start=trainer.eval_at_start),
            Hook(report.sample, at_start=True),
            Hook(_Exports(config, lora, base, num_steps), every=config.hf_save_steps),
        ]
        known = None
        if log_probs is not None:
            known = log_probs.of_steps(pairs, batch_ids, choice=notes.get("reference_log_probs", "auto"))
        notes["reference_log_probs"] = "live" if known is None else "cached"
        with StopSignals() as stop, checkpoints:
            state = train(
                state,
                step,
                packed_batches(pairs, batch_ids[first_step:], layout, place=placement.put_batch, reference=known),
                num_steps=num_steps,
                tracker=tracker,
                first_step=first_step,
                hooks=hooks,
                log_every=trainer.log_every,
                peak_flops=peak_flops(list(placement.mesh.devices.flat)),
                check=guard,
                stop=stop,
                began=began,
            )
    if is_first_process():
        report.print(run_dir)
    return state


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
            "raise trainer.num_train_steps, or choose another trainer.id"
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
        model = load_peft_adapter(base.model, folder, placement)
        model = with_dropout(model, lora.dropout)
    adapters, weights = eqx.partition(model, trainable_filter(model))
    dtype = config.trainer.precision.param_dtype
    adapters = placement.put_parameters(jax.tree.map(lambda x: x.astype(dtype), adapters))
    return eqx.combine(adapters, weights)


def _weights(config: TrainConfig, pairs: PairTable) -> tuple[float, ...] | None:
    weights = config.data.train_weights
    return None if weights is None else tuple(weights[name] for name in pairs.names)


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


def _announce(config, pairs, held_out, model, num_steps, layout, run_dir) -> None:
    counts = _parameter_counts(model)
    logger.info(
        "%s: %s parameters, %s of them trainable (%.2f%%)",
        config.initialize_from_hf,
        f"{counts['parameter_count']:,}",
        f"{counts['trainable_parameter_count']:,}",
        100 * counts["fraction_trainable"],
    )
    logger.info(
        "%s training pairs, %s held out; %s steps of %d pairs, in micro-batches of %s tokens; run folder %s",
        f"{len(pairs):,}",
        f"{len(held_out):,}",
        f"{num_steps:,}",
        config.trainer.train_batch_size,
        " or ".join(f"{part.rows} x {part.row_length}" for part in layout.parts),
        run_dir,
    )


class _Guard:
    """Looks at every step's metrics and stops a run that cannot be right."""

    def __init__(self, config: TrainConfig, pairs: PairTable, starts_equal: bool):
        # Dropout moves the policy away from an adapter that is not zero.
        is_fresh = config.initialize_from_peft is None
        self.expects_ln2 = starts_equal and not config.loss.reference_free and (is_fresh or config.lora.dropout == 0.0)
        # An accelerator's products of float32 numbers are by default of fewer bits too.
        low_precision = config.trainer.precision.compute_dtype != jnp.float32 or jax.default_backend() != "cpu"
        # In bfloat16 two sums of a few hundred log-probs differ by some tenths of a nat; beta is about 0.1.
        self.tolerance = 0.05 if low_precision else 1e-4
        self.pairs = pairs

    def __call__(self, step: int, metrics: StepMetrics, values: dict[str, float]) -> None:
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            raise NonFiniteLossError(self._explain(step, metrics, values))
        if step == 0 and self.expects_ln2 and abs(values["loss"] - math.log(2)) > self.tolerance:
            raise RuntimeError(
                f"the loss of step 0 is {values['loss']:.6f}, but policy and reference should be equal before the "
                f"first update, which makes it ln 2 = {math.log(2):.6f} (tolerance {self.tolerance}). Either the "
                "adapters' product is not zero, or the two are computed differently: please report this."
            )

    def _explain(self, step: int, metrics: StepMetrics, values: dict[str, float]) -> str:
        ids = np.concatenate([np.ravel(on_host(part.array)) for part in metrics.pair_ids])
        losses = np.concatenate([np.ravel(on_host(part.array)) for part in metrics.pair_losses])
        is_pair = ids >= 0
        bad = ids[is_pair & ~np.isfinite(losses)]
        which, ids = ("pairs with such a loss", bad) if len(bad) else ("pairs of the batch", ids[is_pair])
        names = ", ".join(self.pairs.origin(int(i)) for i in ids[:8]) + (", ..." if len(ids) > 8 else "")
        return (
            f"step {step}: the loss is {values['loss']} and the gradient norm {values['grad_norm']}; the update was "
            f"not made and the run stops. {which.capitalize()}: {names}. Look at these rows, or lower "
            "optimizer.learning_rate."
        )


class _Report:
    """Held-out scores and sample completions, before, during and after training."""

    def __init__(
        self,
        config: TrainConfig,
        base: Base,
        tracker: Tracker,
        score: PairScorer,
        reference: ReferenceLogProbs | None,
        starts_equal: bool,
        earlier: list[dict[str, Any]],
    ):
        """`starts_equal`: the policy is the reference before the first step, so its scores are known then.

        `earlier`: what a run that goes on has logged so far.
        """
        self.config, self.base, self.tracker, self.score = config, base, tracker, score
        self.reference, self.starts_equal = reference, starts_equal
        self.reference_scores: PairLogProbs | None = None
        self.scores = [(line["step"], _scores(line)) for line in earlier if "eval/loss" in line]
        self.samples: list[list[str]] = []

    def evaluate(self, info: StepInfo[TrainState]) -> None:
        if not len(self.score.pairs):
            return
        loss = self.config.preference_loss
        if self.reference_scores is None and self.reference is not None:
            # The reference never moves: its scores serve every evaluation of the run.
            self.reference_scores = self.reference.of_table(self.score)
        is_reference = info.step == 0 and self.starts_equal
        policy_scores = (self.reference_scores if is_reference else None) or self.score(info.state.model)
        scores = summarize(loss, policy_scores, self.reference_scores)
        self.scores.append((info.step, scores))
        self.tracker.log({f"eval/{name}": value for name, value in scores.items()}, step=info.step)
        logger.info(
            "held-out after %d steps: loss %.4f, accuracy %.3f, margin %.3f",
            info.step,
            scores["loss"],
            scores["dpo_accuracy"],
            scores["rewards/margins"],
        )

    def sample(self, info: StepInfo[TrainState]) -> None:
        prompts = self.config.sample_prompts
        if not prompts:
            return
        stop_ids = read_stop_ids(self.base.folder)
        self.samples.append(
            complete(info.state.model, self.base.tokenizer, prompts, self.config.generation, stop_ids=stop_ids)
        )

    def print(self, run_dir: Path) -> None:
        """For the person at the terminal: what changed, and where everything is."""
        for index, prompt in enumerate(self.config.sample_prompts):
            print(f"\n{prompt}")
            # A run that goes on has no completions of before the first step.
            for title, samples in zip(("after:", "before:"), reversed(self.samples), strict=False):
                print(f"  {title:<7} {samples[index]}")
        if self.scores:
            print(f"\n{'held-out pairs':<16}" + "".join(f"{'after step ' + str(s):>18}" for s, _ in self._ends()))
            rows = {"accuracy": "dpo_accuracy", "reward margin": "rewards/margins", "loss": "loss"}
            for title, name in rows.items():
                cells = [f"{v[name]:.1%}" if title == "accuracy" else f"{v[name]:.4f}" for _, v in self._ends()]
                print(f"{title:<16}" + "".join(f"{cell:>18}" for cell in cells))
        print()
        for title, path in {
            "adapter": self.config.peft_save_path,
            "merged model": self.config.merged_hf_save_path,
            "metrics": run_dir / "metrics.jsonl",
            "config": run_dir / "config.yaml",
        }.items():
            if path is not None:
                print(f"{title:<14}{path}")

    def _ends(self) -> list[tuple[int, dict[str, float]]]:
        return self.scores[:1] + self.scores[1:][-1:]


def _scores(line: dict[str, Any]) -> dict[str, float]:
    """Of a line of metrics.jsonl, where null stands for what is not finite."""
    return {name.removeprefix("eval/"): math.nan if x is None else x for name, x in line.items() if name != "step"}


class _Exports:
    """Writes the adapter and the merged model to the paths that are set: at the end, and on the way under step-<n>."""

    def __init__(self, config: TrainConfig, lora: LoraConfig, base: Base, num_steps: int):
        self.config, self.lora, self.base, self.num_steps = config, lora, base, num_steps
        paths = (config.peft_save_path, config.merged_hf_save_path)
        if config.hf_save_steps is not None and paths == (None, None):
            raise ValueError("hf_save_steps is set, but neither peft_save_path nor merged_hf_save_path is")
        for path in paths:
            if path is not None:
                check_export_target(path)

    def __call__(self, info: StepInfo[TrainState]) -> None:
        def target(path: str) -> str:
            return path if info.step == self.num_steps else f"{path.rstrip('/')}/step-{info.step}"

        if path := self.config.peft_save_path:
            save_adapter(info.state.model, target(path), base_model=self.config.initialize_from_hf, config=self.lora)
        if path := self.config.merged_hf_save_path:
            # A tokenizer of the user's choice brings its own chat template; the base's files stay as they are.
            tokenizer = self.base.tokenizer if self.config.data.tokenizer else None
            save_merged(info.state.model, self.base.folder, target(path), tokenizer=tokenizer)
