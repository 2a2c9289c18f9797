"""Rewards: a number for each completion of a prompt, where more is better."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from lora_dpo_jax.data.batches import packed_rows
from lora_dpo_jax.data.chat import ExampleTokenizer
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.rows import Example
from lora_dpo_jax.data.sources import RowError
from lora_dpo_jax.data.table import ExampleTable, whole_table
from lora_dpo_jax.log_probs import score_with_reference
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.platforms import jitted
from lora_dpo_jax.sharding import on_host

Prompt = str | Sequence[Mapping[str, Any]]
# Completions of one prompt that share one computation of it. More of them would make rows too long.
SHARING_A_PROMPT = 8


class Reward(Protocol):
    """Scores completions."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """The reward of each completion, given the prompt of the same number."""
        ...


@dataclass(frozen=True)
class ImplicitRewardConfig:
    """Which reward an adapter stands for."""

    beta: float = 0.1  # reward units per nat: the beta of the run that trained the adapter
    length_normalized: bool = False  # divide by the number of the completion's tokens

    def __post_init__(self):
        if not 0.0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta} must be a positive number")


class ImplicitReward:
    """beta * (log p of the model - log p of its base) of a completion, of a model with adapters.

    Section 4 of https://arxiv.org/abs/2305.18290: DPO trains a policy so that this is the reward of its pairs, but for
    a term of the prompt alone. A completion is tokenized as in training, with the token that ends it.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        config: ImplicitRewardConfig = ImplicitRewardConfig(),
        *,
        chat: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        rows: int = 8,
        put_batch: Callable = jax.device_put,
        scope: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """Prompts that are strings are the user's turn, if `chat` is true and there is a template; else plain text.

        `rows` of packed completions are computed together, in `scope`, where `put_batch` has put them.
        """
        self.model, self.config, self.rows, self.put_batch, self.scope = model, config, rows, put_batch, scope
        self._tokenizer = ExampleTokenizer(tokenizer, chat_template)
        self._is_chat = chat and bool(chat_template or tokenizer.chat_template)
        self._options: dict[str, Any] = {"chat_template_kwargs": dict(chat_template_kwargs or {})}
        with scope():
            self._compiled = jitted(score_with_reference)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """The reward of each completion. Raises ValueError if one cannot be tokenized."""
        rewards = np.full(len(completions), np.nan)
        for numbers, of_batch in self.in_batches(prompts, completions):
            rewards[numbers] = of_batch
        return rewards.tolist()

    def in_batches(
        self, prompts: Sequence[Prompt], completions: Sequence[str], *, wanted: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same batch by batch: (numbers of completions, their rewards in float64).

        Batches without any completion that is `wanted` (bool [completion]; None: all are) are left out. The others stay
        as they are, so their rewards are the same, bit for bit.
        """
        if not len(completions):
            return
        groups = _by_prompt(prompts, completions)
        numbers = np.concatenate(groups)
        table = self._table(groups, prompts, completions).switching_at(self.model.config.switch_length)
        arrays = table.arrays
        is_wanted = np.ones(len(numbers), bool) if wanted is None else np.asarray(wanted)[numbers]
        for batch in packed_rows(table, rows=self.rows, place=self.put_batch)[1]:
            micro = batch.micro_batch(0)
            ids, is_response = on_host(micro.examples.ids.array), on_host(micro.examples.is_response.array)
            responses = arrays.responses_of(ids[ids >= 0])
            if not is_wanted[responses].any():
                continue
            with self.scope():
                policy, reference = self._compiled(self.model, None, micro)
            values, held_to = (on_host(x.log_probs.array)[is_response].astype(np.float64) for x in (policy, reference))
            rewards = self.config.beta * (values - held_to)
            if self.config.length_normalized:
                rewards /= arrays.scored_tokens[responses]
            yield numbers[responses], rewards

    def _table(
        self, groups: Sequence[np.ndarray], prompts: Sequence[Prompt], completions: Sequence[str]
    ) -> ExampleTable:
        """Each group as one example, whose prompt is computed once."""
        examples = [
            self._example(prompts[group[0]], [completions[int(number)] for number in group], f"completion {group[0]}")
            for group in groups
        ]
        tokenized: list[TokenizedExample] = []
        for result in self._tokenizer.tokenize(examples):
            if isinstance(result, RowError):
                raise result
            tokenized.append(result[0])
        return whole_table({"completions": MemoryExamples(tokenized, name="completions")})

    def _example(self, prompt: Prompt, completions: list[str], origin: str) -> Example:
        names = tuple(f"completion {number}" for number in range(1, len(completions) + 1))
        common: Any = {"origin": origin, "names": names, "comparisons": ()}
        if isinstance(prompt, str) and not self._is_chat:
            return Example(prompt, tuple(completions), **common)
        messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        answers: Any = tuple([{"role": "assistant", "content": completion}] for completion in completions)
        return Example(messages, answers, **common, **self._options)


def _by_prompt(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[np.ndarray]:
    """The numbers of the completions of each prompt, at most SHARING_A_PROMPT together."""
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions; needed: one for each")
    by_prompt: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_prompt.setdefault(json.dumps(prompt), []).append(number)
    return [
        np.array(numbers[first : first + SHARING_A_PROMPT])
        for numbers in by_prompt.values()
        for first in range(0, len(numbers), SHARING_A_PROMPT)
    ]
