"""The reports of a run besides its metrics: sample completions, and what is printed at the end."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lora_dpo_jax.generation import GenerationConfig, complete
from lora_dpo_jax.printable import printable
from lora_dpo_jax.runs.held_out import HeldOutScores
from lora_dpo_jax.training.loop import StepInfo
from lora_dpo_jax.training.step import TrainState


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


def print_report(
    samples: Samples,
    scores: HeldOutScores,
    places: Mapping[str, str | Path | None],
    *,
    chosen: int | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Prints what changed, and where all outputs are. `places` are paths by title.

    `chosen` is the step of the exported adapters, if it is not the last; `notes` are more texts by title.
    """
    samples.print()
    scores.print(chosen)
    print()
    for title, text in (notes or {}).items():
        print(f"{title:<14}{printable(text)}")
    for title, path in places.items():
        if path is not None:
            print(f"{title:<14}{printable(str(path))}")
