"""The held-out comparisons that a report shows, with the log-ratio of each of their tokens.

Only these few are computed token by token, in one program for the policy and the reference.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lora_dpo_jax.data.batches import packed_rows
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.packing import PreferenceBatch
from lora_dpo_jax.data.pieces import pieces_of, visible
from lora_dpo_jax.data.table import ExampleTable
from lora_dpo_jax.evaluation import Scorer
from lora_dpo_jax.log_probs import score_with_reference
from lora_dpo_jax.losses import TokenScores
from lora_dpo_jax.platforms import jitted
from lora_dpo_jax.report.record import ShownPair, ShownResponse, numbers_of
from lora_dpo_jax.sharding import on_host
from lora_dpo_jax.training.step import TrainState

SHOWN = 5  # of the most right ones, and of the most wrong ones
MOST_TOKENS = 400  # of a response
MOST_PROMPT = 1500  # characters, the last ones


def most_right_and_wrong(
    score: Scorer, state: TrainState, margins: np.ndarray, tokenizer: Any
) -> tuple[list[ShownPair], list[ShownPair]]:
    """(most right, most wrong) by `margins`, the rewards' [comparison]. All processes must call this."""
    table = score.examples
    order = np.argsort(-margins, kind="stable")
    order = order[np.isfinite(margins[order])]
    few = min(SHOWN, len(order) // 2)
    right, wrong = order[:few], order[::-1][:few]
    example_of = np.repeat(np.arange(len(table)), table.arrays.comparison_counts)
    found = _log_ratios(score, state, np.unique(example_of[[*right, *wrong]])) if few else {}

    def shown(comparison: int) -> ShownPair:
        number = int(example_of[comparison])
        example = table[number]
        prompt = visible(tokenizer.decode(example.prompt.tolist(), clean_up_tokenization_spaces=False))
        sides = (
            _response(example, int(k), found[number, int(k)], tokenizer) for k in table.arrays.comparisons[comparison]
        )
        return ShownPair(
            table.origin(number),
            f"… {prompt[-MOST_PROMPT:]}" if len(prompt) > MOST_PROMPT else prompt,
            numbers_of([margins[comparison]])[0],
            *sides,
        )

    return [shown(i) for i in right], [shown(i) for i in wrong]


def _response(example: TokenizedExample, k: int, log_ratios: np.ndarray, tokenizer: Any) -> ShownResponse:
    """`log_ratios`, float32 [token]: of the tokens of response `k`, 0 where they are not scored."""
    ids = example.responses[k]
    # Decoded after the prompt, for tokenizers that drop the space of a first token.
    whole, start = np.concatenate([example.prompt, ids]), len(example.prompt)
    pieces = [*pieces_of(whole, tokenizer, range(start, min(len(whole), start + MOST_TOKENS)))]
    return ShownResponse(
        [text for text, _ in pieces],
        numbers_of([log_ratios[part.start - start : part.stop - start].sum() for _, part in pieces]),
        numbers_of([log_ratios.sum()])[0],
        left_out=max(0, len(ids) - MOST_TOKENS),
    )


def _log_ratios(score: Scorer, state: TrainState, ids: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """log(policy / reference) in nats, float32 [token], by the number of the example and of its response."""
    table: ExampleTable = score.examples.subset(ids)

    def tokens_of(model: Any, reference: Any, micro: PreferenceBatch) -> list[TokenScores]:
        both = score_with_reference(model, reference, micro, per_token=True, per_token_of_reference=True)
        return [scores.per_token for scores in both if scores.per_token is not None]

    with score.scope():
        compiled = jitted(tokens_of)
    found = {}
    _, batches = packed_rows(table, rows=score.rows, place=score.put_batch)
    for batch in batches:
        micro = batch.micro_batch(0)
        with score.scope():
            policy, theirs = compiled(state.model, state.reference, micro)
        ratios = on_host(policy.log_probs.array) - on_host(theirs.log_probs.array)
        places = (on_host(policy.response.array), on_host(policy.index.array))
        for (number, k), values in _of_responses(micro, ratios, *places):
            found[int(ids[number]), k] = _of_all_tokens(table[number], k, values)
    return found


def _of_responses(
    micro: PreferenceBatch, ratios: np.ndarray, response: np.ndarray, index: np.ndarray
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """The values [scored token] of each response, by the number of its example in the table and its own number.

    The last three are [row, target], as in TokenScores.
    """
    example_of = on_host(micro.examples.example_of_response.array)
    ids = on_host(micro.examples.ids.array)
    for row in range(len(ids)):
        seen: dict[int, int] = {}
        for slot in np.flatnonzero(example_of[row] >= 0):
            number = int(ids[row, example_of[row, slot]])
            k = seen[number] = seen.get(number, -1) + 1
            mine = response[row] == slot
            yield (number, k), ratios[row, mine][np.argsort(index[row, mine], kind="stable")]


def _of_all_tokens(example: TokenizedExample, k: int, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """`values` of the scored tokens of a response as those of all its tokens."""
    all_tokens = np.zeros(len(example.responses[k]), np.float32)
    scored = np.ones(len(all_tokens), bool) if example.scored is None else example.scored[k]
    all_tokens[scored] = values
    return all_tokens
