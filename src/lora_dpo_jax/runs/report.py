"""The reports of a run besides the metrics of its steps: held-out scores and sample completions."""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lora_dpo_jax.evaluation import Scorer, summarize, summarize_by_tokens
from lora_dpo_jax.generation import GenerationConfig, complete
from lora_dpo_jax.lora import equals_reference, reference_model
from lora_dpo_jax.losses import Scores
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.printable import printable
from lora_dpo_jax.runs.reference_scores import ReferenceLogProbs
from lora_dpo_jax.tracking import Tracker
from lora_dpo_jax.training.loop import StepInfo
from lora_dpo_jax.training.step import TrainState

logger = logging.getLogger("lora_dpo_jax")


class HeldOutScores:
    """A hook that scores the held-out pairs and logs their means."""

    def __init__(
        self,
        score: Scorer,
        objective: PreferenceObjective,
        reference: ReferenceLogProbs | None,
        tracker: Tracker,
        earlier: Sequence[Mapping[str, Any]],
    ):
        """`earlier`: the lines of metrics.jsonl that a resumed run has logged so far."""
        self.score, self.objective, self.reference, self.tracker = score, objective, reference, tracker
        self.reference_scores: Scores | None = None
        self.scores = [(line["step"], _scores(line)) for line in earlier if "eval/loss" in line]

    def __call__(self, info: StepInfo[TrainState]) -> None:
        if not len(self.score.examples):
            return
        scores = self._scores_by_tokens(info.state) if self.objective.needs_tokens else self._scores_by_sums(info.state)
        self.scores.append((info.step, scores))
        self.tracker.log({f"eval/{name}": value for name, value in scores.items()}, step=info.step)
        texts = {"loss": "loss {:.4f}", "dpo_accuracy": "accuracy {:.3f}", "rewards/margins": "margin {:.3f}"}
        shown = ", ".join(text.format(scores[name]) for name, text in texts.items() if name in scores)
        logger.info("held-out after %d steps: %s", info.step, shown)

    def _scores_by_tokens(self, state: TrainState) -> dict[str, float]:
        columns = self.objective.loss.columns_in(self.score.examples.arrays.columns)
        return summarize_by_tokens(self.objective, columns, self.score, state.model, state.reference)

    def _scores_by_sums(self, state: TrainState) -> dict[str, float]:
        model, reference_scores = state.model, self._of_reference(state)
        if reference_scores is not None and equals_reference(model, state.reference):
            policy_scores = reference_scores
        else:
            policy_scores = self.score(model)
        return summarize(self.objective.loss, policy_scores, reference_scores, self.score.examples.arrays.examples)

    def _of_reference(self, state: TrainState) -> Scores | None:
        if self.reference is not None and state.reference_moves:
            return self.score(reference_model(state.model, state.reference))
        if self.reference is not None and self.reference_scores is None:
            # The reference never changes: its scores serve every evaluation of the run.
            self.reference_scores = self.reference.of_table(self.score)
        return self.reference_scores

    def print(self) -> None:
        """Prints a table of the first scores and the last ones."""
        ends = self.scores[:1] + self.scores[1:][-1:]
        if not ends:
            return
        title = f"held-out {self.score.examples.arrays.noun}"
        print(f"\n{title:<18}" + "".join(f"{'after step ' + str(step):>18}" for step, _ in ends))
        rows = {"accuracy": "dpo_accuracy", "reward margin": "rewards/margins", "loss": "loss"}
        for title, name in rows.items():
            if name not in ends[0][1]:
                continue
            cells = [f"{v[name]:.1%}" if title == "accuracy" else f"{v[name]:.4f}" for _, v in ends]
            print(f"{title:<18}" + "".join(f"{cell:>18}" for cell in cells))


class Samples:
    """A hook that completes the sample prompts, before and after training."""

    def __init__(
        self,
        prompts: Sequence[str],
        tokenizer: Any,
        settings: GenerationConfig,
        *,
        stop_ids: Collection[int],
        scope: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        """`scope`: the context of the run's mesh, which then splits the prompts."""
        self.prompts, self.tokenizer, self.settings, self.stop_ids = prompts, tokenizer, settings, stop_ids
        self.scope = scope
        self.completions: list[list[str]] = []

    def __call__(self, info: StepInfo[TrainState]) -> None:
        if not self.prompts:
            return
        origins = [f"sample_prompts[{index}]" for index in range(len(self.prompts))]
        model, stop_ids = info.state.model, self.stop_ids
        with self.scope():
            completions = complete(
                model, self.tokenizer, self.prompts, self.settings, stop_ids=stop_ids, origins=origins
            )
        self.completions.append(completions)

    def print(self) -> None:
        for index, prompt in enumerate(self.prompts):
            print(f"\n{printable(prompt)}")
            # A run that resumes has no completions from before the first step.
            for title, completions in zip(("after:", "before:"), reversed(self.completions), strict=False):
                print(f"  {title:<7} {printable(completions[index])}")


def print_report(samples: Samples, scores: HeldOutScores, places: Mapping[str, str | Path | None]) -> None:
    """Prints what changed, and where all outputs are. `places` are paths by title."""
    samples.print()
    scores.print()
    print()
    for title, path in places.items():
        if path is not None:
            print(f"{title:<14}{printable(str(path))}")


def _scores(line: Mapping[str, Any]) -> dict[str, float]:
    """The scores in a line of metrics.jsonl, where null stands for infinities and NaN."""
    return {name.removeprefix("eval/"): math.nan if x is None else x for name, x in line.items() if name != "step"}
