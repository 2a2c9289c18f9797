"""What a run has come to, in words and in a few figures."""

import math
from dataclasses import dataclass

import numpy as np

from lora_dpo_jax.report.charts import number, percent
from lora_dpo_jax.report.record import HeldOut
from lora_dpo_jax.report.run_files import RunFiles, Series
from lora_dpo_jax.report.statistics import Estimate, accuracy, likelier_response, longer_response, margin

BESIDE_BASELINES = {
    "above": "The trained model is clearly better than both.",
    "below": "The trained model is clearly worse than the better of these.",
    "neither": "The difference to the better of these is within two standard errors: it may be chance.",
}


@dataclass(frozen=True)
class Figure:
    """A figure of the first screen."""

    title: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    headline: str
    paragraphs: list[str]
    figures: list[Figure]


def verdict_of(run: RunFiles) -> Verdict:
    notes = [f"{title[:1].upper()}{title[1:]}: {text}." for title, text in run.record.notes.items()]
    paragraphs = [*_progress(run), " ".join(_judgement(run)), *notes, *_cautions(run)]
    return Verdict(_headline(run), [*filter(None, paragraphs)], [*_quality(run), *_effort(run)])


def _ends(run: RunFiles, name: str) -> tuple[float, float] | None:
    """The first value of a metric, and that of the exported adapters."""
    series = run.series(name)
    return None if series is None else (float(series.values[0]), run.final(series))


def _noun(run: RunFiles) -> str:
    return run.record.facts.noun if run.record.facts else "examples"


def _headline(run: RunFiles) -> str:
    found = _ends(run, "eval/dpo_accuracy")
    evaluated = run.series("eval/loss")
    if evaluated is None:
        done = _ends(run, "train/loss")
        if done is None:
            return "The run has not taken a step yet"
        return f"Training loss went from {number(done[0])} to {number(done[1])}; nothing was held out to check it"
    if len(evaluated) == 1:
        return f"Evaluated once, after step {evaluated.steps[0]:,}: held-out loss {number(evaluated.last)}"
    if found is None:
        first, last = float(evaluated.values[0]), run.final(evaluated)
        verb = "fell" if last < first else "rose" if last > first else "stayed"
        return f"Held-out loss {verb} from {number(first)} to {number(last)}"
    return f"Held-out accuracy went from {percent(found[0])} to {percent(found[1])}"


def _progress(run: RunFiles) -> list[str]:
    done, wanted = run.steps_done, run.num_steps
    if wanted is not None and done < wanted and not run.record.notes:
        return [f"The run has not finished: {done:,} of {wanted:,} steps are done."]
    return []


def _judgement(run: RunFiles) -> list[str]:
    held_out = run.record.held_out
    if run.series("eval/loss") is None:
        return [
            "No examples were held out, so nothing here shows how the model does on data that it was not trained on. "
            "Set validation_split_fraction, or give a component validation data."
        ]
    after = None if held_out is None else accuracy(held_out, held_out.after)
    if held_out is None or after is None or held_out.after is None:
        return _without_comparisons(run)
    error = f" (standard error {percent(after.error)})" if after.error > 0 else ""
    sentences = [
        f"After step {held_out.after.step:,} the model's rewards prefer the chosen response in {percent(after.mean)} "
        f"of {after.count:,} held-out comparisons{error}."
    ]
    before = accuracy(held_out, held_out.before)
    if before is not None and before.mean == 0.5 and before.error == 0:
        sentences.append("Before training the policy was its own reference, so every comparison counted as half.")
    baselines = _baselines(held_out)
    if baselines:
        told = ", and ".join(f"{what} is right in {percent(found.mean)}" for what, found in baselines.items())
        sentences.append(f"For comparison, without any training: {told}.")
        best = max(found.mean for found in baselines.values())
        sentences.append(BESIDE_BASELINES[after.is_clearly(best)])
    return sentences


def _without_comparisons(run: RunFiles) -> list[str]:
    """Of runs over single answers, or whose comparisons were not scored after training."""
    loss, right, facts = run.series("eval/loss"), run.series("eval/dpo_accuracy"), run.record.facts
    if loss is None or len(loss) < 2 or facts is None or not facts.held_out:
        return []
    change = f"from {number(loss.values[0])} to {number(run.final(loss))}"
    sentences = [f"Over {facts.held_out:,} held-out {facts.noun}, the mean loss went {change}."]
    if right is not None:
        share = run.final(right)
        error = math.sqrt(max(0.0, share * (1 - share)) / facts.held_out)
        sentences.append(
            f"{percent(share)} of them have a reward on the side that their label says (standard error "
            f"{percent(error)}); before training it was {percent(right.values[0])}."
        )
    return sentences


def _baselines(held_out: HeldOut) -> dict[str, Estimate]:
    found = {
        "choosing the longer response": longer_response(held_out),
        "choosing what the untrained model finds likelier": likelier_response(held_out),
    }
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def _cautions(run: RunFiles) -> list[str]:
    found = []
    evaluated, skipped = run.series("eval/loss"), run.series("train/skipped_steps")
    if evaluated is not None and len(evaluated) > 2 and np.isfinite(evaluated.values).any():
        best = int(np.nanargmin(evaluated.values))
        if best < len(evaluated) - 1:
            found.append(
                f"Held-out loss was lowest after {evaluated.steps[best]:,} steps ({number(evaluated.values[best])}) "
                f"and is {number(evaluated.last)} at the end."
            )
    if skipped is not None and skipped.last > 0:
        found.append(f"{skipped.last:,.0f} updates were skipped because their loss or gradient was not finite.")
    if run.record.facts is not None and run.record.facts.loss_warning:
        found.append(run.record.facts.loss_warning)
    return found


def _quality(run: RunFiles) -> list[Figure]:
    held_out, figures = run.record.held_out, []
    of_accuracy = None if held_out is None else accuracy(held_out, held_out.after)
    of_margin = None if held_out is None else margin(held_out, held_out.after)
    comparisons = "" if of_accuracy is None else f", {of_accuracy.count:,} comparisons"
    if (series := run.series("eval/dpo_accuracy")) is not None:
        figures.append(_change(run, "Held-out accuracy", series, percent, of_accuracy, comparisons))
    if (series := run.series("eval/rewards/margins")) is not None:
        figures.append(_change(run, "Held-out reward margin", series, number, of_margin))
    if (series := run.series("eval/loss")) is not None:
        figures.append(_change(run, "Held-out loss", series, number, None))
    if not figures and (series := run.series("train/loss")) is not None:
        figures.append(_change(run, "Training loss", series, number, None))
    return figures


def _change(run: RunFiles, title: str, series: Series, shown, error: Estimate | None, of: str = "") -> Figure:
    last = shown(run.final(series))
    value = last if len(series) == 1 else f"{shown(series.values[0])} → {last}"
    note = f"± {shown(error.error)} standard error{of}" if error is not None and error.error > 0 else of.lstrip(", ")
    return Figure(title, value, note)


def _effort(run: RunFiles) -> list[Figure]:
    facts, sittings, figures = run.record.facts, run.record.sittings, []
    batch, wanted = run.setting("trainer.train_batch_size"), run.num_steps
    of = "" if wanted is None else f" of {wanted:,}"
    figures.append(Figure("Steps", f"{run.steps_done:,}{of}", f"{batch} {_noun(run)} each" if batch else ""))
    if sittings:
        devices = "" if facts is None else f"on {facts.devices}"
        resumed = f", in {len(sittings)} sittings" if len(sittings) > 1 else ""
        figures.append(Figure("Time", duration(sum(s.seconds for s in sittings)), f"{devices}{resumed}"))
    if (speed := typical(run.series("train/tokens_per_second"))) is not None:
        padding = typical(run.series("train/padding_fraction"))
        note = "" if padding is None else f"{percent(padding)} of the rows is padding"
        figures.append(Figure("Speed", f"{number(speed, 3)} tokens/s", note))
    trainable, total = run.series("trainable_parameter_count"), run.series("parameter_count")
    if trainable is not None and total is not None:
        share = f"{trainable.last / total.last:.2%} of {int(total.last):,}"
        figures.append(Figure("Trained parameters", f"{int(trainable.last):,}", share))
    return figures


def typical(series: Series | None) -> float | None:
    """The median without the first point, in which the step was compiled."""
    if series is None:
        return None
    values = series.values[1:] if len(series) > 1 else series.values
    return float(np.median(values))


def duration(seconds: float) -> str:
    """Such as 35 s, 2 min 5 s or 3 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
