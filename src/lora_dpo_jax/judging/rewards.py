"""Rewards: a number for each completion of a prompt, where more is better."""

import math
from collections.abc import Callable, Mapping, Sequence
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
from lora_dpo_jax.runs.prompts import Prompt
from lora_dpo_jax.sharding import on_host

DEFAULT_ROWS = 8  # of packed completions
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
        template_kwargs: Mapping[str, Any] | None = None,
        rows: int = DEFAULT_ROWS,
        put_batch: Callable = jax.device_put,
        scope: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """`template_kwargs`: what the chat template gets for all prompts, or `chat_template` itself.

        `rows` of packed completions are computed together, in `scope`, where `put_batch` has put them.
        """
        self.model, self.config, self.rows, self.put_batch, self.scope = model, config, rows, put_batch, scope
        self._tokenizer, self._template_kwargs = tokenizer, dict(template_kwargs or {})
        with scope():
            self._compiled = jitted(score_with_reference)

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        progress: Callable = lambda batches, total: batches,
    ) -> list[float]:
        """The reward of each completion. Raises ValueError if one cannot be tokenized.

        `progress` wraps the iterator over batches.
        """
        groups = _by_prompt(prompts, completions)
        if not groups:
            return []
        table = self._table(groups, prompts, completions).switching_at(self.model.config.switch_length)
        numbers, arrays, rewards = np.concatenate(groups), table.arrays, np.full(len(completions), np.nan)
        total, batches = packed_rows(table, rows=self.rows, place=self.put_batch)
        for batch in progress(batches, total):
            micro = batch.micro_batch(0)
            with self.scope():
                policy, reference = self._compiled(self.model, None, micro)
            ids, is_response = on_host(micro.examples.ids.array), on_host(micro.examples.is_response.array)
            responses = arrays.responses_of(ids[ids >= 0])
            values, held_to = (on_host(x.log_probs.array)[is_response].astype(np.float64) for x in (policy, reference))
            tokens = arrays.scored_tokens[responses] if self.config.length_normalized else 1
            rewards[numbers[responses]] = self.config.beta * (values - held_to) / tokens
        return rewards.tolist()

    def _table(
        self, groups: Sequence[np.ndarray], prompts: Sequence[Prompt], completions: Sequence[str]
    ) -> ExampleTable:
        """Each group as one example, whose prompt is computed once."""
        tokenizers: dict[str | None, ExampleTokenizer] = {}
        tokenized: list[TokenizedExample] = []
        for group in groups:
            prompt = prompts[group[0]]
            kwargs = {**self._template_kwargs, **prompt.template_kwargs}
            template = kwargs.pop("chat_template", None)
            if template not in tokenizers:
                tokenizers[template] = ExampleTokenizer(self._tokenizer, template)
            is_chat = not isinstance(prompt.content, str) or prompt.chat and (template or self._tokenizer.chat_template)
            example = _example(prompt, [completions[int(number)] for number in group], kwargs, is_chat=bool(is_chat))
            (result,) = tokenizers[template].tokenize([example])
            if isinstance(result, RowError):
                raise result
            tokenized.append(result[0])
        return whole_table({"completions": MemoryExamples(tokenized, name="completions")})


def _example(prompt: Prompt, completions: list[str], kwargs: dict[str, Any], *, is_chat: bool) -> Example:
    """A prompt with its completions, which no comparison joins."""
    names = tuple(f"completion {number}" for number in range(1, len(completions) + 1))
    content: Any = prompt.content
    if not is_chat:
        return Example(content, tuple(completions), prompt.origin, names, comparisons=())
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    turns: Any = tuple([{"role": "assistant", "content": completion}] for completion in completions)
    tools = kwargs.pop("tools", None)
    return Example(messages, turns, prompt.origin, names, comparisons=(), tools=tools, chat_template_kwargs=kwargs)


def _by_prompt(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[np.ndarray]:
    """The numbers of the completions of each prompt, at most SHARING_A_PROMPT together."""
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions; needed: one for each")
    by_prompt: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_prompt.setdefault(repr((prompt.content, prompt.chat, prompt.template_kwargs)), []).append(number)
    return [
        np.array(numbers[first : first + SHARING_A_PROMPT])
        for numbers in by_prompt.values()
        for first in range(0, len(numbers), SHARING_A_PROMPT)
    ]
