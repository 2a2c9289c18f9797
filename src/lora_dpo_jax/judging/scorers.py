"""Where the scores of completions come from: the setting `scorer` of the command `pairs`."""

from dataclasses import dataclass

import draccus

from lora_dpo_jax.judging.judges import JudgeConfig
from lora_dpo_jax.judging.rewards import ImplicitRewardConfig


@dataclass(frozen=True)
class ScorerConfig(draccus.ChoiceRegistry):
    """One source of scores."""

    @classmethod
    def default_choice_name(cls) -> str:
        return "reward"


@ScorerConfig.register_subclass("reward")
@dataclass(frozen=True, kw_only=True)
class RewardScorer(ScorerConfig, ImplicitRewardConfig):
    """The implicit reward of an adapter: beta * (log p with it - log p without it)."""

    adapter: str  # a PEFT folder (or hub id) that was trained on preferences
    base: str | None = None  # the model that it was trained on, a folder or hub id; null: `model`


@ScorerConfig.register_subclass("given")
@dataclass(frozen=True)
class GivenScores(ScorerConfig):
    """Numbers of completions_file."""

    field: str = "score"  # the column of a number for each completion; more is better


@ScorerConfig.register_subclass("judge")
@dataclass(frozen=True)
class JudgeScorer(ScorerConfig):
    """A judge compares each two completions of a prompt in both orders. A score is the share of these that it wins."""

    judge: JudgeConfig  # who judges
