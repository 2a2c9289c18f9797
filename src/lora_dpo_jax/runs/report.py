"""What a run tells of its model besides the metrics of its steps: held-out scores and sample completions."""

import logging
import math
from pathlib import Path
from typing import Any

from lora_dpo_jax.evaluation import PairScorer, summarize
from lora_dpo_jax.generation import complete, read_stop_ids
from lora_dpo_jax.lora import equals_reference
from lora_dpo_jax.losses import PairLogProbs
from lora_dpo_jax.printable import printable
from lora_dpo_jax.runs.reference_scores import ReferenceLogProbs
from lora_dpo_jax.runs.setup import Base, TrainConfig
from lora_dpo_jax.tracking import Tracker
from lora_dpo_jax.training.loop import StepInfo
from lora_dpo_jax.training.step import TrainState

logger = logging.getLogger("lora_dpo_jax")


class Report:
    """Held-out scores and sample completions, before, during and after training."""

    def __init__(
        self,
        config: TrainConfig,
        base: Base,
        tracker: Tracker,
        score: PairScorer,
        reference: ReferenceLogProbs | None,
        earlier: list[dict[str, Any]],
    ):
        """`earlier`: what a resumed run has logged so far."""
        self.config, self.base, self.tracker, self.score = config, base, tracker, score
        self.reference = reference
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
        model, reference_scores = info.state.model, self.reference_scores
        if reference_scores is not None and equals_reference(model, info.state.reference):
            policy_scores = reference_scores
        else:
            policy_scores = self.score(model)
        scores = summarize(loss, policy_scores, reference_scores)
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
        origins = [f"sample_prompts[{index}]" for index in range(len(prompts))]
        stop_ids, settings = read_stop_ids(self.base.folder), self.config.generation
        self.samples.append(
            complete(info.state.model, self.base.tokenizer, prompts, settings, stop_ids=stop_ids, origins=origins)
        )

    def print(self, run_dir: Path) -> None:
        """For the person at the terminal: what changed, and where everything is."""
        for index, prompt in enumerate(self.config.sample_prompts):
            print(f"\n{printable(prompt)}")
            # A run that goes on has no completions of before the first step.
            for title, samples in zip(("after:", "before:"), reversed(self.samples), strict=False):
                print(f"  {title:<7} {printable(samples[index])}")
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
                print(f"{title:<14}{printable(str(path))}")

    def _ends(self) -> list[tuple[int, dict[str, float]]]:
        return self.scores[:1] + self.scores[1:][-1:]


def _scores(line: dict[str, Any]) -> dict[str, float]:
    """Of a line of metrics.jsonl, where null stands for what is not finite."""
    return {name.removeprefix("eval/"): math.nan if x is None else x for name, x in line.items() if name != "step"}
