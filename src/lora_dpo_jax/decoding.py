"""Decoding of many requests in the rows of one batch: a row that ends is given to the next request.

    prompts, packed in rows   ->  _admit   keys and values of each prompt, in the first slots of its row of the cache
    the rows' last tokens     ->  _decode  the next token of every row, again and again
                                           until all rows have ended, or enough of them for those that wait

    slots of a row:  | prompt, without its last token | the rest is empty | new keys, in a ring |

All rows write their keys to the same slot of the ring in one step, whenever each of them began. The position of every
key stands beside the cache. Shapes are the same for all batches of a call: two programs serve them.
"""

import functools
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis
from jax import Array

from lora_dpo_jax.axes import KEY_POSITION, POSITION, ROW
from lora_dpo_jax.models import CachedMask, CausalLM, PackedMask
from lora_dpo_jax.models.decoder import admitted
from lora_dpo_jax.sampling import GenerationConfig, choose
from lora_dpo_jax.sharding import on_host, row_shards, whole

# Lengths are multiples of these, so that requests of similar lengths share programs.
SLOT_BLOCK = 32
TOKEN_BLOCK = 64
PACKED_TOKENS = 2048  # of prompts that a device computes together, unless one prompt alone has more
FEW_TOKENS = 256  # a packed row up to here takes all scores of attention at once
# Where batch_size is null.
CACHE_BYTES = 2**30  # of one device, at most
MOST_ROWS = 128  # of one device


@dataclass
class Request:
    """A prompt and its completion so far."""

    index: int  # among all prompts
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
        ends = (i for i, token in enumerate(new_ids) if token in stop_ids)
        new = new_ids[: next(ends, len(new_ids))]
        self.is_complete = len(new) < self.budget
        self.completion += new


@dataclass(frozen=True)
class Sizes:
    """The shapes of a call's programs."""

    rows: int
    packed_rows: int
    packed_length: int  # tokens
    prompt_slots: int
    ring: int  # slots

    @staticmethod
    def of(model: CausalLM, requests: Sequence[Request], config: GenerationConfig) -> "Sizes":
        prompts = {tuple(request.ids) for request in requests}
        longest, shards = max(map(len, prompts)), row_shards()
        prompt_slots = _multiple(longest - 1, SLOT_BLOCK)
        together = min(_tokens(-(-sum(map(len, prompts)) // shards)), PACKED_TOKENS)
        rows = config.batch_size or shards * _rows_that_fit(model, prompt_slots + config.max_new_tokens)
        rows = _multiple(min(rows, len(requests)), shards)
        return Sizes(rows, shards, max(_tokens(longest), together), prompt_slots, config.max_new_tokens)

    @property
    def slots(self) -> int:
        return self.prompt_slots + self.ring


def _rows_that_fit(model: CausalLM, slots: int) -> int:
    config = model.config
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim * slots
    return min(MOST_ROWS, max(1, CACHE_BYTES // (numbers * model.model.cache_dtype.itemsize)))


def _tokens(count: int) -> int:
    return _multiple(count, TOKEN_BLOCK if count <= 8 * TOKEN_BLOCK else 4 * TOKEN_BLOCK)


def _multiple(count: int, block: int) -> int:
    return max(1, -(-count // block)) * block


class Decoding(eqx.Module):
    """The state of all rows between two steps. Arrays are int32[row] unless said otherwise."""

    time: Array  # int32 scalar: steps since the first
    last_ids: Array  # the token to read next
    positions: Array  # its position
    num_new: Array  # tokens chosen since the row was given to its request
    new_ids: Array  # int32[row, ring]: the token chosen at time t is at t modulo the ring
    done: Array  # bool[row]
    key_positions: Array  # int32[row, slot]; negative: no key, or one that the row's request does not see
    indices: Array  # of the row's request
    num_before: Array  # of the request's tokens that were generated before
    budgets: Array  # tokens to choose
    cache: Any


class Admission(eqx.Module):
    """Requests that are given rows, as NumPy arrays: each process of a run passes its own copy."""

    ids: Any  # int32[packed row, position], as the next two
    segments: Any  # from 1 in each row; 0: padding
    positions: Any
    source: Any  # int32[row, prompt slot]: the place of its token in `ids`, flattened; any, if there is none
    is_new: Any  # bool[row]
    last_ids: Any  # int32[row], as the rest
    lengths: Any
    indices: Any
    num_before: Any
    budgets: Any


def fulfil(model: CausalLM, requests: Sequence[Request], config: GenerationConfig, stop_ids: frozenset[int]) -> None:
    """Extends the completion of each request by at most its budget."""
    sizes, decoder = Sizes.of(model, requests, config), model.for_decoding()
    # Both are inputs of a compiled program, so that other ones do not compile it again.
    stops, seed = np.array(sorted(stop_ids), np.int32), np.array(config.seed, np.uint32)
    program = replace(config, seed=0, batch_size=None)
    waiting, time = deque(requests), 0
    seated: list[tuple[Request, int] | None] = [None] * sizes.rows  # each with the time at which it began
    state = _empty(decoder, sizes)
    while waiting or any(seated):
        while waiting and None in seated:
            state = _admit((model, _seat(waiting, seated, time, sizes)), state)
        # While others wait, a quarter of the rows may stand idle. Each return costs the rows that are given away.
        enough = max(1, sizes.rows // 4) if waiting else sizes.rows + 1
        state = _decode((decoder, program, np.int32(enough), seed, stops), state)
        time = int(on_host(state.time))
        done, num_new, new_ids = (on_host(x) for x in (state.done, state.num_new, state.new_ids))
        for row, seat in enumerate(seated):
            if seat is not None and done[row]:
                request, began = seat
                request.take(new_ids[row, (began + np.arange(num_new[row])) % sizes.ring].tolist(), stop_ids)
                seated[row] = None


def _seat(waiting: deque[Request], seated: list[Any], time: int, sizes: Sizes) -> Admission:
    """Gives free rows to those that wait, as many as fit into one prefill, which has equal prompts once."""
    rows = sizes.rows
    ids, segments, positions = (np.zeros((sizes.packed_rows, sizes.packed_length), np.int32) for _ in range(3))
    of_rows = {name: np.zeros(rows, np.int32) for name in ("last_ids", "indices", "num_before", "budgets")}
    new = Admission(
        ids, segments, positions, np.zeros((rows, sizes.prompt_slots), np.int32), np.zeros(rows, bool),
        lengths=np.ones(rows, np.int32), **of_rows,
    )  # fmt: skip
    used = np.zeros(sizes.packed_rows, np.int64)
    places: dict[tuple[int, ...], int] = {}
    for row in (row for row, seat in enumerate(seated) if seat is None):
        if not waiting:
            break
        prompt = tuple(waiting[0].ids)
        if prompt not in places:
            into, length = int(used.argmin()), len(prompt)
            begin = int(used[into])
            if begin + length > sizes.packed_length:
                break
            here = slice(begin, begin + length)
            ids[into, here], positions[into, here] = prompt, np.arange(length)
            segments[into, here] = segments[into].max() + 1
            used[into] += length
            places[prompt] = into * sizes.packed_length + begin
        request = waiting.popleft()
        seated[row] = request, time
        new.source[row, : len(prompt) - 1] = places[prompt] + np.arange(len(prompt) - 1)
        new.is_new[row], new.last_ids[row], new.lengths[row] = True, prompt[-1], len(prompt)
        new.indices[row], new.num_before[row] = request.index, len(request.completion)
        new.budgets[row] = request.budget
    return new


def _empty(model: CausalLM, sizes: Sizes) -> Decoding:
    """No row has a request."""
    of_rows = ("last_ids", "positions", "num_new", "indices", "num_before", "budgets")
    numbers: dict[str, Any] = {name: np.zeros(sizes.rows, np.int32) for name in of_rows}
    numbers |= {"time": np.array(0, np.int32), "new_ids": np.zeros((sizes.rows, sizes.ring), np.int32)}
    numbers |= {"key_positions": np.full((sizes.rows, sizes.slots), -1, np.int32), "done": np.ones(sizes.rows, bool)}
    return Decoding(**numbers, cache=model.model.empty_cache(Axis(ROW, sizes.rows), sizes.slots))


@functools.partial(eqx.filter_jit, donate="all-except-first")
def _admit(given: tuple[CausalLM, Admission], state: Decoding) -> Decoding:
    """Computes the prompts' keys and values, and begins their rows.

    The last token of a prompt is the first that `_decode` reads. It is computed here too, because some rotary settings
    turn all keys by the length of the prompt.
    """
    model, new = given
    rows, prompt_slots = new.source.shape
    axes = Axis(ROW, new.ids.shape[0]), Axis(POSITION, new.ids.shape[1])
    ids, segments, positions = (hax.auto_sharded(hax.named(x, axes)) for x in (new.ids, new.segments, new.positions))
    mask = PackedMask(segments, hax.zeros_like(segments), positions, is_short=axes[1].size <= FEW_TOKENS)
    keys = model.model(ids, positions, mask, keeps_keys=True).cache
    Row, Slots = Axis(ROW, rows), Axis(KEY_POSITION, prompt_slots)
    source, is_new = hax.auto_sharded((hax.named(new.source, (Row, Slots)), hax.named(new.is_new, Row)))
    cache = admitted(state.cache, keys, source, is_new)

    slot = jnp.arange(state.key_positions.shape[1])[None, :]
    given_rows = Decoding(
        state.time, new.last_ids, new.lengths - 1, jnp.zeros_like(state.num_new), state.new_ids, new.budgets < 1,
        jnp.where(slot < new.lengths[:, None] - 1, slot, -1), new.indices, new.num_before, new.budgets, None,
    )  # fmt: skip

    def begun(now: Array, before: Array) -> Array:
        of_row = new.is_new.reshape(rows, *[1] * (before.ndim - 1))
        return jnp.where(of_row, now, before) if before.ndim else before

    return replace(whole(jax.tree.map(begun, given_rows, replace(state, cache=None))), cache=cache)


@functools.partial(eqx.filter_jit, donate="all-except-first")
def _decode(given: tuple[CausalLM, GenerationConfig, Any, Any, Any], state: Decoding) -> Decoding:
    """Takes steps until all rows are done, or `enough` of them."""
    model, config, enough, seed, stop_ids = given
    rows, ring = state.new_ids.shape
    slots = state.key_positions.shape[1]
    Row, Slots, Pos = Axis(ROW, rows), Axis(KEY_POSITION, slots), Axis(POSITION, 1)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), state.indices)

    def step(state: Decoding) -> Decoding:
        place = state.time % ring
        slot = slots - ring + place
        positions = jnp.where(state.done, -1, state.positions)[:, None]
        key_positions = jax.lax.dynamic_update_slice(state.key_positions, positions, (jnp.int32(0), slot))
        ids, position_ids = (
            hax.auto_sharded(hax.named(x[:, None], (Row, Pos))) for x in (state.last_ids, state.positions)
        )
        mask = CachedMask(position_ids, hax.auto_sharded(hax.named(key_positions, (Row, Slots))))
        output = model.model(ids, position_ids, mask, cache=state.cache, slot=slot)
        logits = model.head(output.hidden[POSITION, 0]).rearrange((Row, model.config.Vocab)).array
        step_keys = jax.vmap(jax.random.fold_in)(row_keys, state.num_before + state.num_new)
        chosen = whole(choose(logits, step_keys, config))
        # The ring of a row that is done may be full: it is not written any more.
        before = jax.lax.dynamic_slice_in_dim(state.new_ids, place, 1, axis=1)
        column = jnp.where(state.done[:, None], before, chosen[:, None])
        num_new = state.num_new + ~state.done
        stopped = (chosen[:, None] == stop_ids[None, :]).any(axis=1) | (num_new >= state.budgets)
        return replace(
            state,
            time=state.time + 1,
            last_ids=chosen,
            positions=state.positions + 1,
            num_new=num_new,
            new_ids=jax.lax.dynamic_update_slice(state.new_ids, column, (jnp.int32(0), place)),
            done=state.done | stopped,
            key_positions=key_positions,
            cache=output.cache,
        )

    def must_continue(state: Decoding) -> Array:
        return ~state.done.all() & (state.done.sum() < enough)

    state = jax.lax.while_loop(must_continue, step, state)
    return replace(whole(replace(state, cache=None)), cache=state.cache)
