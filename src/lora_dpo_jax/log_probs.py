"""From a model and a packed batch to the log-probabilities of its pairs, with no `[tokens, vocab]` array.

Only hidden states that predict a response token reach the head, a block at a time. Each block's logits live in float32
for as long as the block is computed; the backward pass does not build them again: what the forward pass keeps is the
gradient of each log-probability with respect to its hidden state, an array as large as those states.
"""

from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray

from lora_dpo_jax.data.packing import PAIR, POSITION, ROW, TARGET, PreferenceBatch
from lora_dpo_jax.lora import TokenKey, reference_model, split_key, trainable_filter
from lora_dpo_jax.losses import PairLogProbs
from lora_dpo_jax.models import CausalLM, PackedMask
from lora_dpo_jax.sharding import gathered

BLOCK_LOGITS_BYTES = 2**26  # how much a block's logits may take on a device, unless 64 targets a row take more


def pair_log_probs(model: CausalLM, batch: PreferenceBatch, *, key=None) -> PairLogProbs:
    """Sums of log p(token) over each response, float32 {row, pair}, for one micro-batch.

    `key` switches the adapters' dropout on. Empty pairs get 0.
    """
    k_model, k_head = split_key(_token_key(key, batch), 2)
    output = model.model(batch.tokens, batch.position_ids, _mask(batch), key=k_model)
    return _response_log_probs(gathered(model.head), output.hidden, batch, key=k_head)


def policy_and_reference_log_probs(
    model: CausalLM, reference: Any, batch: PreferenceBatch, *, key=None
) -> tuple[PairLogProbs, PairLogProbs]:
    """The same of the policy `model` and of `lora.reference_model(model, reference)`.

    Both pass through each layer together, so weights that are split over devices are gathered once for both.
    """
    k_model, k_head = split_key(_token_key(key, batch), 2)
    adapters = None if reference is None else reference.model
    output, reference_hidden = model.model.with_reference(
        adapters, batch.tokens, batch.position_ids, _mask(batch), key=k_model
    )
    head = gathered(model.head)  # by itself, XLA would gather it for each block of targets
    reference_head = reference_model(head, None if reference is None else reference.head)
    policy = _response_log_probs(head, output.hidden, batch, key=k_head)
    return policy, _response_log_probs(reference_head, reference_hidden, batch)


def _mask(batch: PreferenceBatch) -> PackedMask:
    return PackedMask(batch.segment_ids, batch.branch_ids, batch.position_ids)


def _token_key(key, batch: PreferenceBatch) -> TokenKey | None:
    """Tells tokens apart by their pair in the data, and by what they are in it."""
    if key is None:
        return None
    slot = jnp.maximum(batch.segment_ids.array - 1, 0)
    pair = hax.named(jnp.take_along_axis(batch.pair_ids.array, slot, axis=-1), batch.segment_ids.axes)
    return TokenKey(key, (pair, 3 * batch.position_ids + batch.branch_ids))


def _response_log_probs(head: Any, hidden: NamedArray, batch: PreferenceBatch, *, key=None) -> PairLogProbs:
    per_token = target_log_probs(head, hidden, batch.source, batch.target_ids, batch.target_slot >= 0, key=key)
    Pair = batch.pair_ids.resolve_axis(PAIR)
    Slot = Axis("slot", 2 * Pair.size)
    belongs: Any = batch.target_slot.broadcast_axis(Slot) == hax.arange(Slot)
    summed = _sum_rounded_once(hax.where(belongs, per_token, 0.0))
    summed = summed.unflatten_axis(Slot, (Pair, Axis("response", 2))).rearrange((ROW, PAIR, "response"))
    return PairLogProbs(
        chosen=summed["response", 0],
        rejected=summed["response", 1],
        chosen_tokens=batch.chosen_tokens,
        rejected_tokens=batch.rejected_tokens,
    )


def _sum_rounded_once(per_token: NamedArray) -> NamedArray:
    """Over targets. A plain float32 sum of thousands of nats would differ by its order in the fourth decimal."""
    coarse = hax.round(per_token * 256.0) / 256.0  # such numbers add up without any rounding
    return hax.sum(coarse, axis=TARGET) + hax.sum(per_token - coarse, axis=TARGET)


def target_log_probs(
    head: Any,
    hidden: NamedArray,
    source: NamedArray,
    target_ids: NamedArray,
    is_target: NamedArray,
    *,
    key: TokenKey | None = None,
) -> NamedArray:
    """log p(target | hidden state at source), float32 {row, target}; 0 where `is_target` is false.

    `head` maps to {vocab}; `hidden` is {row, position, embed}; the next three are {row, target},
    with true targets first; the tokens of `key`, for dropout, are {row, position}. A head without adapters gets no
    gradient at all, not even a zero one.
    """
    adapters, weights = eqx.partition(head, trainable_filter(head))
    return _target_log_probs(adapters, hidden, weights, (source, target_ids, is_target), key)


@jax.custom_vjp
def _target_log_probs(adapters, hidden, weights, targets, key):
    log_probs, _ = _forward(adapters, hidden, weights, targets, key, keep_gradients=False)
    return log_probs


def _target_log_probs_fwd(adapters, hidden, weights, targets, key):
    recompute = bool(jax.tree.leaves(adapters))
    log_probs, gradients = _forward(adapters, hidden, weights, targets, key, keep_gradients=not recompute)
    return log_probs, (adapters, hidden, weights, targets, key, gradients)


def _target_log_probs_bwd(saved, cotangent: NamedArray):
    adapters, hidden, weights, targets, key, gradients = saved
    source, _, is_target = targets
    cotangent = hax.where(is_target, cotangent, 0.0)
    if gradients is not None:
        per_target = gradients * cotangent.astype(gradients.dtype)
        return None, _scatter(per_target, source, hidden), None, None, None
    d_adapters, d_hidden = _recompute_gradients(adapters, hidden, weights, targets, key, cotangent)
    return d_adapters, d_hidden, None, None, None


_target_log_probs.defvjp(_target_log_probs_fwd, _target_log_probs_bwd)


def _forward(adapters, hidden, weights, targets, key, *, keep_gradients: bool):
    """Log-probs and, if asked for, their gradients {row, target, embed} with respect to the hidden states."""
    head = eqx.combine(adapters, weights)
    source, _, is_target = targets
    Block, num_blocks = _blocks(head, is_target)
    Embed = hidden.resolve_axis(head.Embed.name)

    def one_block(index, carry):
        log_probs, gradients = carry
        at = index * Block.size
        states, targets_here, key_here = _take_block(hidden, targets, key, at, Block)
        block_log_probs, pull = _block_log_probs(head, states, targets_here, key_here, keep_gradients)
        log_probs = log_probs.updated_slice({TARGET: at}, block_log_probs)
        if keep_gradients:
            gradients = gradients.updated_slice({TARGET: at}, pull)
        return log_probs, gradients

    log_probs = hax.zeros_like(is_target, dtype=jnp.float32)
    gradients = hax.zeros((*source.axes, Embed), dtype=hidden.dtype) if keep_gradients else None
    return jax.lax.fori_loop(0, num_blocks, one_block, (log_probs, gradients))


def _block_log_probs(head, states, targets, key, keep_gradients: bool):
    """log p of a block {row, target} and, if asked for, its gradient with respect to `states`."""
    _, target_ids, is_target = targets
    Vocab = head.Vocab

    def logits_of(states):
        return head(states, key=key)

    if keep_gradients:
        logits, pullback = jax.vjp(logits_of, states)
    else:
        logits, pullback = logits_of(states), None
    log_normalizer = hnn.logsumexp(logits, axis=Vocab)
    is_target_id = (target_ids.broadcast_axis(Vocab) == hax.arange(Vocab)).rearrange(logits.axes)
    target_logit = hax.sum(hax.where(is_target_id, logits, 0.0), axis=Vocab)
    log_probs = hax.where(is_target, target_logit - log_normalizer, 0.0)
    if pullback is None:
        return log_probs, None
    (gradients,) = pullback((is_target_id - hax.exp(logits - log_normalizer)).rearrange(logits.axes))
    return log_probs, gradients


def _recompute_gradients(adapters, hidden, weights, targets, key, cotangent):
    """Gradients of a head that has adapters: its blocks are computed again, one at a time."""
    head = eqx.combine(adapters, weights)
    Block, num_blocks = _blocks(head, targets[2])

    def one_block(index, carry):
        d_adapters, d_hidden = carry
        at = index * Block.size
        states, targets_here, key_here = _take_block(hidden, targets, key, at, Block)

        def log_probs_of(adapters, states):
            head = eqx.combine(adapters, weights)
            return _block_log_probs(head, states, targets_here, key_here, keep_gradients=False)[0]

        _, pullback = jax.vjp(log_probs_of, adapters, states)
        more_adapters, d_states = pullback(cotangent[{TARGET: hax.ds(at, Block)}])
        d_hidden = d_hidden + _scatter(d_states, targets_here[0], hidden)
        return jax.tree.map(jnp.add, d_adapters, more_adapters), d_hidden

    zeros = jax.tree.map(jnp.zeros_like, adapters), hax.zeros_like(hidden)
    return jax.lax.fori_loop(0, num_blocks, one_block, zeros)


def _blocks(head, is_target: NamedArray) -> tuple[Axis, jax.Array]:
    """The axis of a block of targets, and how many blocks hold a target in any row."""
    Target, Row = is_target.resolve_axis(TARGET), is_target.resolve_axis(ROW)
    rows = Row.size // _row_shards(Row)
    size = max(64, BLOCK_LOGITS_BYTES // (4 * head.Vocab.size * rows))
    # Blocks of equal size, so that the last one does not reach beyond the targets.
    size = next(size for size in range(min(size, Target.size), 0, -1) if Target.size % size == 0)
    longest = hax.max(hax.sum(is_target, axis=TARGET))
    return Target.resize(size), -(-longest.scalar() // size)


def _row_shards(Row: Axis) -> int:
    """How many groups of devices share the rows among them."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else hax.partitioning.physical_axis_size(Row) or 1


def _take_block(hidden: NamedArray, targets, key: TokenKey | None, at, Block: Axis):
    """The hidden states that predict targets `at` to `at + Block.size`, {row, target, embed}, and these targets.

    Of `key`, that of the tokens with these states.
    """
    here = tuple(x[{TARGET: hax.ds(at, Block)}] for x in targets)
    source = here[0]
    if key is not None:
        taken = (jnp.take_along_axis(number.array, source.array, axis=-1) for number in key.token)
        key = TokenKey(key.key, tuple(hax.named(number, source.axes) for number in taken))
    return _gather(hidden, source), here, key


def _gather(hidden: NamedArray, source: NamedArray) -> NamedArray:
    """hidden {row, position, embed} at source {row, target}."""
    Row, Target, Embed = (*source.axes, hidden.axes[-1])
    hidden = hidden.rearrange((ROW, POSITION, Embed))
    taken = jnp.take_along_axis(hidden.array, source.array[:, :, None], axis=1)
    return hax.named(taken, (Row, Target, Embed))


def _scatter(values: NamedArray, source: NamedArray, like: NamedArray) -> NamedArray:
    """The transpose of `_gather`: adds values {row, target, embed} up at their sources, in the axes of `like`."""
    Row, Pos, Embed = like.axes
    values = values.rearrange((ROW, TARGET, Embed)).astype(like.dtype)

    # Row by row, so that XLA sees that devices with other rows have nothing to add.
    def add_up(values: jax.Array, source: jax.Array) -> jax.Array:
        return jnp.zeros((Pos.size, Embed.size), like.dtype).at[source].add(values)

    return hax.named(jax.vmap(add_up)(values.array, source.array), (Row, Pos, Embed))
