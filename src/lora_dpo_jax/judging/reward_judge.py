"""A judge that prefers the answer with the greater reward, such as the implicit reward of an adapter."""

import json
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_dpo_jax.judging.interface import Judge, JudgeConfig, Question, RunModels, Verdict
from lora_dpo_jax.judging.rewards import ImplicitReward, ImplicitRewardConfig, Reward
from lora_dpo_jax.models.quantization import QUANTIZATIONS
from lora_dpo_jax.places import refuse_impossible_paths
from lora_dpo_jax.runs.prompts import Prompt
from lora_dpo_jax.runs.systems import Dtype, ModelSystems
from lora_dpo_jax.settings.choices import check_choice

ADAPTER = "judge.adapter"
AT_ONCE = 1024  # questions whose answers are scored together, before their verdicts are known


@JudgeConfig.register_subclass("reward")
@dataclass(frozen=True)
class RewardJudgeConfig(JudgeConfig):
    """The implicit reward of an adapter: beta * (log p of the adapter - log p of its base) of each answer."""

    model: str | None = None  # folder or hub id of the adapter's base; null: initialize_from_hf
    adapter: str | None = None  # a PEFT folder (or hub id); null: the run's, at peft_save_path
    tokenizer: str | None = None  # null: the adapter's if it has one, else the model's
    beta: float | None = None  # reward units per nat; null: the beta of the run's loss
    length_normalized: bool = False  # divide by the number of the answer's tokens
    dtype: Dtype | None = None  # of the weights; null: f32 on CPU, bf16 on accelerators
    quantization: str | None = None  # of the weights: nf4, int8 or none; null: as the run's
    batch_size: int = 8  # rows computed together; bounds memory

    def __post_init__(self):
        names = ("model", "adapter", "tokenizer")
        refuse_impossible_paths({name: getattr(self, name) for name in names})
        if self.beta is not None and not 0.0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta} must be positive and finite")
        if self.quantization is not None:
            check_choice("quantization", self.quantization, QUANTIZATIONS)
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")

    def check(self, run: RunModels) -> None:
        self._systems(run)

    def start(self, run: RunModels) -> "RewardJudge":
        systems = self._systems(run)
        config = ImplicitRewardConfig(self.beta or run.beta, self.length_normalized)
        identity = {
            "type": "reward",
            **systems.identities(run.cache / "digests")[ADAPTER],
            "beta": config.beta,
            "length_normalized": config.length_normalized,
        }
        ((_, model),) = systems.models()
        reward = ImplicitReward(model, systems.tokenizers[ADAPTER], config, rows=self.batch_size)
        return RewardJudge(reward, identity)

    def _systems(self, run: RunModels) -> ModelSystems:
        base, adapter = self.model or run.base, self.adapter or run.adapter
        if base is None:
            raise ValueError("judge.model is missing: set it, or initialize_from_hf, to the base of judge.adapter")
        if adapter is None:
            raise ValueError("judge.adapter is missing: set it, or peft_save_path, to the adapter whose reward judges")
        return ModelSystems.find(
            ("judge.model", base),
            {ADAPTER: adapter},
            revision=run.revision if self.model is None else None,
            tokenizer=("judge.tokenizer", self.tokenizer),
            dtype=self.dtype,
            quantization=self.quantization or run.quantization,
        )


class RewardJudge(Judge):
    """Prefers the answer with the greater reward. The order of the answers has no part in it."""

    def __init__(self, reward: Reward, identity: Mapping[str, Any]):
        self._reward, self._identity = reward, identity

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def verdicts(self, questions: Sequence[Question]) -> Generator[tuple[int, Verdict], None, None]:
        for start in range(0, len(questions), AT_ONCE):
            of_batch = questions[start : start + AT_ONCE]
            known = self._scores(of_batch)
            for index, question in enumerate(of_batch, start=start):
                first, second = (known.get((_key(question.prompt), x)) for x in (question.first, question.second))
                yield index, _verdict(first, second)

    def _scores(self, questions: Sequence[Question]) -> dict[tuple[str, str], float]:
        """The reward by (key of the prompt, answer). Each answer is scored once, for both orders."""
        answers = {
            (_key(question.prompt), answer): question.prompt
            for question in questions
            for answer in (question.first, question.second)
            if answer.strip()
        }
        scores = self._reward.score([*answers.values()], [answer for _, answer in answers])
        return dict(zip(answers, scores, strict=True))


def _verdict(first: float | None, second: float | None) -> Verdict:
    if first is None or second is None:
        return Verdict(None, "an empty answer has no reward")
    preferred = "tie" if first == second else "first" if first > second else "second"
    return Verdict(preferred, f"reward of A = {first:.4f}, of B = {second:.4f}")


def _key(prompt: Prompt) -> str:
    return json.dumps([prompt.content, prompt.chat, prompt.template_kwargs], sort_keys=True, default=dict)
