"""From a model and a packed micro-batch to the scores of its responses, with no `[tokens, vocab]` array.

Only hidden states that predict a response token reach the head, one block at a time. A block's float32 logits exist
only while the block is computed. The backward pass does not recompute them: the forward pass keeps the gradient of each
log-probability with respect to its hidden state, an array as large as those states. Only a head with adapters
recomputes its blocks.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import MICRO, POSITION, RESPONSE, ROW, TARGET
from lora_dpo_jax.data.packing import PreferenceBatch
from lora_dpo_jax.lora import TokenKey, reference_model, split_key, trainable_filter
from lora_dpo_jax.losses import Scores, TokenScores
from lora_dpo_jax.models import CausalLM, PackedMask
from lora_dpo_jax.platforms import platform
from lora_dpo_jax.sharding import gathered

# The limit for a block's logits on a device, by platform, unless 64 targets a row take more. Each block reads the whole
# head. On an H100, blocks of 2**26 bytes (128 targets of an 8B model) are bound by these reads. Blocks of 2**29 need no
# more memory for a step, because its peak is in the layers.
BLOCK_LOGITS_BYTES = {"cpu": 2**25, "tpu": 2**26, "gpu": 2**29}


def _entropy(logits: NamedArray, log_normalizer: NamedArray, target_logit: NamedArray) -> NamedArray:
    """The entropy of the next token, in nats."""
    log_probs = logits - log_normalizer
    # A product, because a CPU adds up its terms in parallel, and those of a sum one after the other.
    return -hax.dot(hax.exp(log_probs), log_probs, axis="vocab", precision=jax.lax.Precision.HIGHEST)


def _log_sum_of_squares(logits: NamedArray, log_normalizer: NamedArray, target_logit: NamedArray) -> NamedArray:
    """log of the sum of p^2 over the vocabulary: the log-probability that two sampled tokens are equal."""
    return hnn.logsumexp(2.0 * (logits - log_normalizer), axis="vocab")


def _is_likeliest(logits: NamedArray, log_normalizer: NamedArray, target_logit: NamedArray) -> NamedArray:
    """1.0 if no other token is likelier than the target, else 0.0."""
    return (target_logit >= hax.max(logits, axis="vocab")).astype(jnp.float32)


# Statistics of each token that a loss may ask for. Arguments: the block's logits {row, target, vocab}, the log of their
# normalizer {row, target} and the target's logit {row, target}.
STATISTICS: dict[str, Callable[[NamedArray, NamedArray, NamedArray], NamedArray]] = {
    "entropy": _entropy,
    "log_sum_of_squares": _log_sum_of_squares,
    "is_likeliest": _is_likeliest,
}


def score_responses(
    model: CausalLM, micro: PreferenceBatch, *, key=None, per_token: bool = False, statistics: Sequence[str] = ()
) -> Scores:
    """The scores {row, response} of one micro-batch. `key` switches the adapters' dropout on. Empty slots get 0.

    `per_token` or `statistics` add the scores of each token, with these statistics. Raises ValueError for a batch of
    several micro-batches.
    """
    _check_one_micro_batch(micro)
    k_model, k_head = split_key(_token_key(key, micro), 2)
    output = model.model(micro.tokens, micro.position_ids, _mask(micro), key=k_model)
    scores = _scores(gathered(model.head), output.hidden, micro, key=k_head, per_token=per_token, statistics=statistics)
    return dataclasses.replace(scores, auxiliary=output.auxiliary)


def score_with_reference(
    model: CausalLM,
    reference: Any,
    micro: PreferenceBatch,
    *,
    key=None,
    per_token: bool = False,
    per_token_of_reference: bool = False,
    statistics: Sequence[str] = (),
) -> tuple[Scores, Scores]:
    """The scores under the policy `model` and under `lora.reference_model(model, reference)`.

    Only the policy's scores have statistics. Both models pass through each layer together, so weights that are split
    over devices are gathered once for both.
    """
    _check_one_micro_batch(micro)
    k_model, k_head = split_key(_token_key(key, micro), 2)
    adapters = None if reference is None else reference.model
    output, reference_hidden = model.model.with_reference(
        adapters, micro.tokens, micro.position_ids, _mask(micro), key=k_model
    )
    head = gathered(model.head)  # otherwise XLA would gather it for each block of targets
    reference_head = reference_model(head, None if reference is None else reference.head)
    policy = _scores(head, output.hidden, micro, key=k_head, per_token=per_token, statistics=statistics)
    policy = dataclasses.replace(policy, auxiliary=output.auxiliary)
    return policy, _scores(reference_head, reference_hidden, micro, per_token=per_token_of_reference)


def _check_one_micro_batch(micro: PreferenceBatch) -> None:
    if micro.tokens.has_axis(MICRO):
        raise ValueError(
            "needed: one micro-batch; found: a batch of several. Iterate over training.step.micro_batches(batch), or "
            "call training.step.accumulate"
        )


def _mask(micro: PreferenceBatch) -> PackedMask:
    return PackedMask(micro.segment_ids, micro.branch_ids, micro.position_ids)


def _token_key(key, micro: PreferenceBatch) -> TokenKey | None:
    """Identifies each token by its example in the data, and by its rotary position and branch in the example."""
    if key is None:
        return None
    slot = jnp.maximum(micro.segment_ids.array - 1, 0)
    example = hax.named(jnp.take_along_axis(micro.examples.ids.array, slot, axis=-1), micro.segment_ids.axes)
    # One number for position and branch: branches 0 to 2, those of a pair, have the numbers below 2**25.
    beyond, branch = micro.branch_ids // 3, micro.branch_ids % 3
    return TokenKey(key, (example, beyond * 2**25 + 3 * micro.position_ids + branch))


def _scores(
    head: Any,
    hidden: NamedArray,
    micro: PreferenceBatch,
    *,
    key=None,
    per_token: bool = False,
    statistics: Sequence[str] = (),
) -> Scores:
    is_target = micro.target_response >= 0
    log_probs, found = target_log_probs(
        head, hidden, micro.source, micro.target_ids, is_target, key=key, statistics=tuple(statistics)
    )
    Response = micro.response_tokens.resolve_axis(RESPONSE)
    belongs: Any = micro.target_response.broadcast_axis(Response) == hax.arange(Response)
    summed = _sum_rounded_once(hax.where(belongs, log_probs, 0.0)).rearrange((ROW, RESPONSE))
    tokens = None
    if per_token or statistics:
        tokens = TokenScores(log_probs, micro.target_response, _index_in_response(micro, belongs), found)
    return Scores(summed, micro.response_tokens, tokens)


def _index_in_response(micro: PreferenceBatch, belongs: NamedArray) -> NamedArray:
    """int32 {row, target}: the index of each target among those of its response, which are consecutive."""
    Target = micro.source.resolve_axis(TARGET)
    place = hax.arange(Target).broadcast_to(micro.source.axes)
    first = hax.min(hax.where(belongs, place, Target.size), axis=TARGET)
    of_mine = hax.sum(hax.where(belongs, first, 0), axis=RESPONSE).rearrange(place.axes)
    return hax.where(micro.target_response >= 0, place - of_mine, 0)


def _sum_rounded_once(per_token: NamedArray) -> NamedArray:
    """The sum over targets. In a plain float32 sum of thousands of nats, the order would change the fourth decimal."""
    coarse = hax.round(per_token * 256.0) / 256.0  # sums of such numbers are exact
    return hax.sum(coarse, axis=TARGET) + hax.sum(per_token - coarse, axis=TARGET)


def target_log_probs(
    head: Any,
    hidden: NamedArray,
    source: NamedArray,
    target_ids: NamedArray,
    is_target: NamedArray,
    *,
    key: TokenKey | None = None,
    statistics: tuple[str, ...] = (),
) -> tuple[NamedArray, dict[str, NamedArray]]:
    """log p(target | hidden state at source), float32 {row, target}; 0 where `is_target` is false.

    `head` maps to {vocab}; `hidden` is {row, position, embed}; the next three are {row, target}, with true targets
    first; the tokens of `key`, for dropout, are {row, position}. A head without adapters gets no gradient at all, not
    even a zero one. Also returns the `statistics`, by their names in STATISTICS, with the same axes and no gradient.
    """
    if unknown := sorted(set(statistics) - set(STATISTICS)):
        raise ValueError(f"unknown statistics of tokens: {unknown}; known: {sorted(STATISTICS)}")
    adapters, weights = eqx.partition(head, trainable_filter(head))
    return _target_log_probs(statistics, adapters, hidden, weights, (source, target_ids, is_target), key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _target_log_probs(statistics, adapters, hidden, weights, targets, key):
    log_probs, found, _ = _forward(adapters, hidden, weights, targets, key, statistics, keep_gradients=False)
    return log_probs, found


def _target_log_probs_fwd(statistics, adapters, hidden, weights, targets, key):
    recompute = bool(jax.tree.leaves(adapters))
    log_probs, found, gradients = _forward(
        adapters, hidden, weights, targets, key, statistics, keep_gradients=not recompute
    )
    return (log_probs, found), (adapters, hidden, weights, targets, key, gradients)


def _target_log_probs_bwd(statistics, saved, cotangents):
    adapters, hidden, weights, targets, key, gradients = saved
    source, _, is_target = targets
    cotangent = hax.where(is_target, cotangents[0], 0.0)
    if gradients is not None:
        per_target = gradients * cotangent.astype(gradients.dtype)
        return None, _scatter(per_target, source, hidden), None, None, None
    d_adapters, d_hidden = _recompute_gradients(adapters, hidden, weights, targets, key, cotangent)
    return d_adapters, d_hidden, None, None, None


_target_log_probs.defvjp(_target_log_probs_fwd, _target_log_probs_bwd)


def _forward(adapters, hidden, weights, targets, key, statistics: tuple[str, ...], *, keep_gradients: bool):
    """Log-probs, statistics and, if `keep_gradients`, gradients {row, target, embed} with respect to the states."""
    head = eqx.combine(adapters, weights)
    source, _, is_target = targets
    Block, num_blocks = _blocks(head, is_target)
    Embed = hidden.resolve_axis(head.Embed.name)

    def one_block(index, carry):
        log_probs, found, gradients = carry
        at = index * Block.size
        states, targets_here, key_here = _take_block(hidden, targets, key, at, Block)
        of_block, more, pull = _block_log_probs(head, states, targets_here, key_here, statistics, keep_gradients)
        log_probs = log_probs.updated_slice({TARGET: at}, of_block)
        found = {name: values.updated_slice({TARGET: at}, more[name]) for name, values in found.items()}
        if keep_gradients:
            gradients = gradients.updated_slice({TARGET: at}, pull)
        return log_probs, found, gradients

    log_probs = hax.zeros_like(is_target, dtype=jnp.float32)
    found = {name: log_probs for name in statistics}
    gradients = hax.zeros((*source.axes, Embed), dtype=hidden.dtype) if keep_gradients else None
    return jax.lax.fori_loop(0, num_blocks, one_block, (log_probs, found, gradients))


def _block_log_probs(head, states, targets, key, statistics: tuple[str, ...], keep_gradients: bool):
    """log p of a block {row, target}, its statistics and, if `keep_gradients`, its gradient by `states`."""
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
    found = {
        name: hax.where(is_target, STATISTICS[name](logits, log_normalizer, target_logit), 0.0) for name in statistics
    }
    if pullback is None:
        return log_probs, found, None
    (gradients,) = pullback((is_target_id - hax.exp(logits - log_normalizer)).rearrange(logits.axes))
    return log_probs, found, gradients


def _recompute_gradients(adapters, hidden, weights, targets, key, cotangent):
    """The gradients of a head that has adapters. Recomputes its blocks, one at a time."""
    head = eqx.combine(adapters, weights)
    Block, num_blocks = _blocks(head, targets[2])

    def one_block(index, carry):
        d_adapters, d_hidden = carry
        at = index * Block.size
        states, targets_here, key_here = _take_block(hidden, targets, key, at, Block)

        def log_probs_of(adapters, states):
            head = eqx.combine(adapters, weights)
            return _block_log_probs(head, states, targets_here, key_here, (), keep_gradients=False)[0]

        _, pullback = jax.vjp(log_probs_of, adapters, states)
        more_adapters, d_states = pullback(cotangent[{TARGET: hax.ds(at, Block)}])
        d_hidden = d_hidden + _scatter(d_states, targets_here[0], hidden)
        return jax.tree.map(jnp.add, d_adapters, more_adapters), d_hidden

    zeros = jax.tree.map(jnp.zeros_like, adapters), hax.zeros_like(hidden)
    return jax.lax.fori_loop(0, num_blocks, one_block, zeros)


def _blocks(head, is_target: NamedArray) -> tuple[Axis, jax.Array]:
    """The axis of a block of targets, and the number of blocks that hold a target in any row."""
    Target, Row = is_target.resolve_axis(TARGET), is_target.resolve_axis(ROW)
    rows = Row.size // _row_shards(Row)
    size = max(64, BLOCK_LOGITS_BYTES[platform()] // (4 * head.Vocab.size * rows))
    # Blocks of equal size, so that the last block does not extend beyond the targets.
    size = next(size for size in range(min(size, Target.size), 0, -1) if Target.size % size == 0)
    longest = hax.max(hax.sum(is_target, axis=TARGET))
    return Target.resize(size), -(-longest.scalar() // size)


def _row_shards(Row: Axis) -> int:
    """The number of groups of devices that the rows are split over."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else hax.partitioning.physical_axis_size(Row) or 1


def _take_block(hidden: NamedArray, targets, key: TokenKey | None, at, Block: Axis):
    """The hidden states that predict targets `at` to `at + Block.size`, {row, target, embed}, and these targets.

    Also returns `key` for the tokens of these states.
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
    """The transpose of `_gather`: sums values {row, target, embed} at their sources, in the axes of `like`."""
    Row, Pos, Embed = like.axes
    values = values.rearrange((ROW, TARGET, Embed)).astype(like.dtype)

    # Row by row, so that XLA sees that devices with other rows have nothing to add.
    def add_up(values: jax.Array, source: jax.Array) -> jax.Array:
        return jnp.zeros((Pos.size, Embed.size), like.dtype).at[source].add(values)

    return hax.named(jax.vmap(add_up)(values.array, source.array), (Row, Pos, Embed))
