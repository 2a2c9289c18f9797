"""Completions with a chat template and a key-value cache, greedy or sampled."""

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis
from jax import Array
from jinja2 import TemplateSyntaxError

from lora_dpo_jax.axes import COMPLETION, KEY_POSITION, POSITION
from lora_dpo_jax.json_objects import is_whole, read_json_object
from lora_dpo_jax.models import CachedMask, CausalLM
from lora_dpo_jax.sharding import on_host

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
# Prompts are padded to a multiple of this many tokens, so that prompts of similar lengths share a compilation.
PROMPT_BLOCK = 64


@dataclass(frozen=True)
class GenerationConfig:
    """How to choose tokens. Names and meanings are those of transformers."""

    max_new_tokens: int = 128  # tokens of a completion, at most
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # sample among the fewest tokens whose probabilities add up to this
    top_k: int | None = None  # sample among this many likeliest tokens, or more if the last of them ties; before top_p
    seed: int = 0  # of the sampling
    batch_size: int = 8  # prompts computed together; bounds memory

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or null for every token")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be in [0, 2**32)")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        if self.temperature == 0.0 and (self.top_p, self.top_k) != (1.0, None):
            raise ValueError(
                f"top_p={self.top_p} and top_k={self.top_k} change nothing at temperature=0, which is greedy: set a "
                "temperature above 0 to sample"
            )


def complete(
    model: CausalLM,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Message]],
    config: GenerationConfig,
    *,
    stop_ids: Collection[int] = (),
    chat: bool = True,
    origins: Sequence[str] | None = None,
    **template_kwargs: Any,
) -> list[str]:
    """The completion of each prompt, without special tokens.

    The tokenizer's chat template renders a list of messages, with `template_kwargs`. It also renders a string, as the
    only user message, if there is a template and `chat` is true. Any other string is raw text. A completion ends at one
    of `stop_ids` or at the tokenizer's end-of-sequence token. `origins` name the prompts in errors.
    """
    token_ids = encode_prompts(tokenizer, prompts, chat=chat, origins=origins, **template_kwargs)
    stop_ids = {*stop_ids} | ({tokenizer.eos_token_id} - {None})
    completions = generate(model, token_ids, config, stop_ids=stop_ids)
    return [tokenizer.decode(completion, skip_special_tokens=True) for completion in completions]


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Message]],
    *,
    chat: bool = True,
    origins: Sequence[str] | None = None,
    **template_kwargs: Any,
) -> list[list[int]]:
    """The tokens of each prompt; see `complete`. Raises ValueError that names the first prompt with an error."""
    token_ids = []
    for index, prompt in enumerate(prompts):
        try:
            token_ids.append(encode_prompt(tokenizer, prompt, chat=chat, **template_kwargs))
        except ValueError as error:
            raise ValueError(f"{origins[index] if origins else f'prompts[{index}]'}: {error}") from error
    return token_ids


def encode_prompt(
    tokenizer: Any, prompt: str | Sequence[Message], *, chat: bool = True, **template_kwargs: Any
) -> list[int]:
    """The tokens of one prompt; see `complete`. Raises ValueError if the prompt cannot be encoded."""
    _check_surrogates(prompt)
    has_template = bool(tokenizer.chat_template or template_kwargs.get("chat_template"))
    if isinstance(prompt, str):
        if not (chat and has_template):
            return _encode_text(tokenizer, prompt)
        prompt = [{"role": "user", "content": prompt}]
    if not has_template:
        raise ValueError("the prompt is a list of messages, but the tokenizer has no chat template: give a string")
    template_kwargs = {"add_generation_prompt": True, **template_kwargs}
    try:
        return tokenizer.apply_chat_template(list(prompt), tokenize=True, return_dict=False, **template_kwargs)
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
    except Exception as error:  # a template is a program, and may raise any type for odd messages
        raise ValueError(f"the chat template rejects it: {error}") from error


def _check_surrogates(prompt: str | Sequence[Message]) -> None:
    try:
        json.dumps(prompt, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is no character") from error


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer(text)["input_ids"]
    # Some tokenizers add the end-of-sequence token to every text. A prompt must not have it, because it continues.
    ended = tokenizer.eos_token and ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if ended and len(ids) > 1 else ids


def read_stop_ids(folder: Path) -> frozenset[int]:
    """The token ids that end a completion: from `generation_config.json`, or from `config.json` if that is absent.

    Raises ValueError that names the file if `eos_token_id` is no token id, no list of these and not null.
    """
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            settings = read_json_object(folder / name)
            ids = settings.taken("eos_token_id", None, _is_ids, "a token id, a list of them or null")
            return frozenset([] if ids is None else ids if isinstance(ids, list) else [ids])
    return frozenset()


def _is_ids(value: Any) -> bool:
    return all(is_whole(item, 0) for item in (value if isinstance(value, list) else [value]))


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    stop_ids: Collection[int],
    streams: Sequence[int] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, up to the first of `stop_ids` but without it.

    `streams`: the number of each prompt's random stream, in [0, 2**32); None: its index. A completion depends on its
    prompt, its stream and the seed, not on the other prompts or on `batch_size`.
    """
    _check_prompts(model, prompts, config)
    stop_ids = frozenset(stop_ids)
    stop_array = np.array(sorted(stop_ids), dtype=np.int32)
    # The seed is an input of the compiled program, so that another seed does not compile it again.
    program, seed = replace(config, seed=0), np.array(config.seed, dtype=np.uint32)
    numbers = range(len(prompts)) if streams is None else streams
    requests = [_Request(stream, prompt) for stream, prompt in zip(numbers, prompts, strict=True)]
    # Beyond a length, `longrope` rotates all keys otherwise, so those in the cache are computed again, as transformers
    # does.
    for length in (model.config.switch_length, None):
        for request in requests:
            request.extend_to(length, config.max_new_tokens)
        for batch, of_batch in _batches([request for request in requests if request.budget], config.batch_size):
            new_ids = on_host(_generate_batch(model, batch, seed, stop_array, program))
            for request, row in zip(of_batch, new_ids.tolist(), strict=False):
                request.take(row, stop_ids)
    return [request.completion for request in requests]


@dataclass
class _Request:
    """A prompt and its completion so far."""

    stream: int  # of random numbers
    prompt: Sequence[int]
    completion: list[int] = field(default_factory=list)
    budget: int = 0  # how many more tokens to generate from the present cache
    is_complete: bool = False

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.completion]

    def extend_to(self, length: int | None, max_new_tokens: int) -> None:
        """Asks for the tokens whose logits come from sequences of up to `length` tokens; None = all that are left."""
        left = max_new_tokens - len(self.completion)
        if length is not None:
            left = max(0, min(left, length + 1 - len(self.ids)))
        self.budget = 0 if self.is_complete else left

    def take(self, new_ids: list[int], stop_ids: Collection[int]) -> None:
        new = _until(new_ids[: self.budget], stop_ids)
        self.is_complete = len(new) < self.budget
        self.completion += new


class _PromptBatch(eqx.Module):
    """Prompts padded on the right, as NumPy arrays: each process of a run passes its own copy.

    Rows with a budget of 0 may complete the last batch, so that its shape is already compiled. They stop at once.
    """

    ids: Any  # int32[row, position]
    lengths: Any  # int32[row]
    streams: Any  # uint32[row]: of random numbers
    num_before: Any  # int32[row]: tokens at the end of `ids` that were generated before
    budgets: Any  # int32[row]: how many tokens to generate


def _batches(requests: Sequence[_Request], batch_size: int) -> Iterator[tuple[_PromptBatch, Sequence[_Request]]]:
    num_rows = min(batch_size, len(requests))
    for first in range(0, len(requests), batch_size):
        of_batch = requests[first : first + batch_size]
        padded_length = -(-max(len(request.ids) for request in of_batch) // PROMPT_BLOCK) * PROMPT_BLOCK
        batch = _PromptBatch(
            np.zeros((num_rows, padded_length), np.int32),
            np.ones(num_rows, np.int32),
            np.zeros(num_rows, np.uint32),
            *(np.zeros(num_rows, np.int32) for _ in range(2)),
        )
        for i, request in enumerate(of_batch):
            batch.ids[i, : len(request.ids)], batch.lengths[i] = request.ids, len(request.ids)
            batch.streams[i], batch.num_before[i] = request.stream, len(request.completion)
            batch.budgets[i] = request.budget
        yield batch, of_batch


class _Decoding(eqx.Module):
    """The state of decoding between two new tokens."""

    num_new: Array  # int32 scalar
    new_ids: Array  # int32[row, new], of which `num_new` columns are known
    done: Array  # bool[row]
    cache: Any  # the keys and values so far


@eqx.filter_jit
def _generate_batch(model: CausalLM, batch: _PromptBatch, seed: Any, stop_ids: Any, config: GenerationConfig) -> Array:
    """The new tokens, int32[row, max_new_tokens]; tokens after a stop token are undefined."""
    num_rows, prompt_slots = batch.ids.shape
    Row, Slots = Axis(COMPLETION, num_rows), Axis(KEY_POSITION, prompt_slots + config.max_new_tokens)
    key_positions = _key_positions(batch.lengths, prompt_slots, Slots.size)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), batch.streams)

    def forward(ids, positions, slot, cache, read_at) -> tuple[Array, Any]:
        """Logits float32[row, vocab] at column `read_at` of each row, and the new cache."""
        Pos = Axis(POSITION, ids.shape[1])
        position_ids = hax.named(positions, (Row, Pos))
        mask = CachedMask(position_ids, hax.named(key_positions, (Row, Slots)))
        output = model.model(hax.named(ids, (Row, Pos)), position_ids, mask, cache=cache, slot=slot)
        last = output.hidden[POSITION, hax.named(read_at, Row)]
        return model.head(last).rearrange((Row, model.config.Vocab)).array, output.cache

    def step(state: _Decoding, logits: Array, cache: Any) -> _Decoding:
        step_keys = jax.vmap(jax.random.fold_in)(row_keys, batch.num_before + state.num_new)
        ids = choose(logits, step_keys, config)
        new_ids = jax.lax.dynamic_update_slice(state.new_ids, ids[:, None], (jnp.int32(0), state.num_new))
        stopped = (ids[:, None] == stop_ids[None, :]).any(axis=1) | (state.num_new + 1 >= batch.budgets)
        return _Decoding(state.num_new + 1, new_ids, state.done | stopped, cache)

    def must_continue(state: _Decoding) -> Array:
        return (state.num_new < config.max_new_tokens) & ~state.done.all()

    def decode(state: _Decoding) -> _Decoding:
        last = state.num_new - 1
        ids = jax.lax.dynamic_slice_in_dim(state.new_ids, last, 1, axis=1)
        positions = (batch.lengths + last)[:, None]
        logits, cache = forward(ids, positions, prompt_slots + last, state.cache, jnp.zeros_like(batch.lengths))
        return step(state, logits, cache)

    new_ids = jnp.zeros((num_rows, config.max_new_tokens), dtype=jnp.int32)
    cache = model.model.empty_cache(Row, Slots.size)
    # Padding must not look like a longer prompt: some rotary settings depend on a sequence's length.
    positions = jnp.minimum(jnp.arange(prompt_slots)[None, :], batch.lengths[:, None] - 1)
    logits, cache = forward(batch.ids, positions, jnp.int32(0), cache, batch.lengths - 1)
    state = step(_Decoding(jnp.int32(0), new_ids, batch.budgets < 1, cache), logits, cache)
    return jax.lax.while_loop(must_continue, decode, state).new_ids


def _key_positions(lengths: Array, prompt_slots: int, slots: int) -> Array:
    """int32[row, slot]: the position of the key in each slot, negative where a prompt is padded.

    New tokens go to the slots after the padding and have the positions after the prompt. The causal mask hides slots
    that are not yet written: their positions lie after every query.
    """
    slot, lengths = jnp.arange(slots)[None, :], lengths[:, None]
    return jnp.where(slot < prompt_slots, jnp.where(slot < lengths, slot, -1), slot - prompt_slots + lengths)


def choose(logits: Array, keys: Array, config: GenerationConfig) -> Array:
    """int32[row]: the next token of each row, from float32[row, vocab] and one random key per row."""
    if config.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_logits(logits / config.temperature, config)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def filter_logits(logits: Array, config: GenerationConfig) -> Array:
    """Logits float32[row, vocab] with -inf for the tokens that top_k, and then top_p among the rest, exclude."""
    vocab_size = logits.shape[-1]
    if config.top_k is not None:
        smallest = jax.lax.top_k(logits, min(config.top_k, vocab_size))[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if config.top_p < 1.0:
        ascending = jnp.argsort(logits, axis=-1)
        up_to = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, ascending, axis=-1), axis=-1), axis=-1)
        # Excludes the least likely tokens that add up to 1 - top_p, but never the likeliest token.
        kept = (up_to > 1.0 - config.top_p) | (jnp.arange(vocab_size)[None, :] == vocab_size - 1)
        kept = jnp.put_along_axis(jnp.zeros_like(kept), ascending, kept, axis=-1, inplace=False)
        logits = jnp.where(kept, logits, -jnp.inf)
    return logits


def _until(ids: list[int], stop_ids: Collection[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


def _check_prompts(model: CausalLM, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> None:
    limit, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{i}] has no tokens; a completion needs at least one token before it")
        if bad := [token for token in prompt if not 0 <= token < vocab_size]:
            raise ValueError(f"prompts[{i}] holds token {bad[0]}, but the model knows 0 to {vocab_size - 1}")
    longest = max(map(len, prompts), default=0)
    if longest + config.max_new_tokens > limit:
        logger.warning(
            "The longest prompt has %d tokens; with max_new_tokens=%d, its completion can exceed the model's "
            "max_position_embeddings=%d. Text beyond this length is often poor.",
            longest,
            config.max_new_tokens,
            limit,
        )
