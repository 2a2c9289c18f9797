"""The pairs that are measured: drawn by a length profile, or read from a file of preferences."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from bench.profiles import PROFILES, Length, LengthProfile
from lora_dpo_jax.data import (
    ComponentConfig,
    ExampleSizes,
    ExampleTable,
    FormatConfig,
    MemoryExamples,
    TokenizedExample,
    UrlSource,
    tokenize_component,
    whole_table,
)

BOS, EOS, FIRST_ID, LAST_ID = 1, 2, 3, 32000  # drawn ids are in [FIRST_ID, LAST_ID)


PARTS = ("prompt", "chosen", "rejected")


def load(
    data: str,
    count: int,
    *,
    vocab_size: int,
    tokenizer: str | None = None,
    cap: int | None = None,
    responses: int = 2,
    apart: bool = False,
) -> ExampleTable:
    """`count` pairs of a profile, or the first ones of a file (jsonl or parquet, tokenized with `tokenizer`'s folder).

    `cap` (tokens of prompt + one response) drops longer rows of a file. More than two `responses` are ranked lists of a
    profile; `apart`, `count` of their comparisons. Raises ValueError if the file has too few.
    """
    if responses > 2 and data in PROFILES:
        lists = -(-count // math.comb(responses, 2)) if apart else count
        pairs = ranked(PROFILES[data], lists, responses, vocab_size=vocab_size)
        pairs = as_pairs(pairs)[:count] if apart else pairs
    elif responses > 2:
        raise ValueError(f"data={data!r} is a file, of which pairs are read; responses={responses} needs a profile")
    elif data in PROFILES:
        pairs = synthetic(PROFILES[data], count, vocab_size=vocab_size)
    elif not Path(data).is_file():
        raise ValueError(f"data={data!r} is neither a file nor one of the profiles {[*PROFILES]}")
    elif tokenizer is None:
        raise ValueError(f"data={data!r} is a file, so tokenizer must name the folder of a tokenizer")
    else:
        pairs = from_file(data, count, tokenizer, cap or 1024)
    if (highest := max(int(tokens.max()) for pair in pairs for tokens in pair.parts)) >= vocab_size:
        raise ValueError(f"{data} holds token {highest}, but the model embeds only {vocab_size}; use another tokenizer")
    return whole_table({data: MemoryExamples(pairs, data)})


def synthetic(profile: LengthProfile, count: int, *, vocab_size: int, seed: int = 0) -> list[TokenizedExample]:
    """Random ids; a prompt begins with BOS, a response ends with EOS.

    More pairs begin with the same ones, and lengths do not depend on the vocabulary.
    """
    return [
        TokenizedExample.pair(prompt, *responses)
        for prompt, responses in _drawn(profile, [profile.chosen, profile.rejected], count, vocab_size, seed)
    ]


def ranked(
    profile: LengthProfile, count: int, responses: int, *, vocab_size: int, seed: int = 0
) -> list[TokenizedExample]:
    """Lists of `responses` with all their comparisons. Their lengths are, in turns, those of the profile's two."""
    lengths = list(itertools.islice(itertools.cycle([profile.chosen, profile.rejected]), responses))
    comparisons = tuple(itertools.combinations(range(responses), 2))
    drawn = _drawn(profile, lengths, count, vocab_size, seed)
    return [TokenizedExample(prompt, answers, comparisons) for prompt, answers in drawn]


def as_pairs(examples: Iterable[TokenizedExample]) -> list[TokenizedExample]:
    """Each comparison as a pair of its own."""
    return [
        TokenizedExample.pair(example.prompt, example.responses[chosen], example.responses[rejected])
        for example in examples
        for chosen, rejected in example.comparisons
    ]


def _drawn(
    profile: LengthProfile, lengths: Sequence[Length], count: int, vocab_size: int, seed: int
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, ...]]]:
    """`count` prompts, each with a response for each of `lengths`."""
    rng = np.random.default_rng(seed)

    def length(of: Length, shortest: int, longest: int) -> int:
        return int(np.clip(rng.lognormal(np.log(of.median), of.sigma), shortest, longest))

    def ids(number: int) -> list[int]:
        drawn = rng.integers(FIRST_ID, LAST_ID, number)
        return (FIRST_ID + (drawn - FIRST_ID) % (min(vocab_size, LAST_ID) - FIRST_ID)).tolist()

    for _ in range(count):
        prompt = length(profile.prompt, profile.shortest_prompt, profile.longest_prompt)
        sizes = [length(of, 4, profile.cap - prompt) for of in lengths]
        first = np.array([BOS, *ids(prompt - 1)], np.int32)
        yield first, tuple(np.array([*ids(size - 1), EOS], np.int32) for size in sizes)


def from_file(path: str, count: int, tokenizer: str, cap: int) -> list[TokenizedExample]:
    """The first `count` usable pairs of at most `cap` tokens, read and tokenized as for training."""
    pairs = whole_file(path, tokenizer, cap)
    if len(pairs) < count:
        raise ValueError(f"{path} holds {len(pairs)} usable pairs of at most {cap} tokens; {count} were asked for")
    return [pairs[index] for index in range(count)]


def whole_file(path: str, tokenizer: str, cap: int) -> ExampleTable:
    component = ComponentConfig(UrlSource(train_urls=[path]), FormatConfig(slice_strategy="drop", invalid_rows="drop"))
    pairs = tokenize_component(component, AutoTokenizer.from_pretrained(tokenizer), split="train", train_seq_len=cap)
    return whole_table({path: pairs})


def real_tokens(sizes: ExampleSizes) -> int:
    """Prompt and response of each sequence: a prompt counts twice, padding never, whatever the system."""
    return int((sizes.tokens + sizes.prompt * (sizes.responses - 1)).sum())


def write_jsonl(pairs: Sequence[TokenizedExample], path: Path) -> None:
    """For the peers, one object a line: prompt_ids, chosen_ids, rejected_ids."""
    with open(path, "w", encoding="utf-8") as file:
        for pair in pairs:
            row = {
                f"{name}_ids": tokens.tolist()
                for name, tokens in zip(("prompt", "chosen", "rejected"), pair.parts, strict=True)
            }
            file.write(json.dumps(row) + "\n")


def load_jsonl(path: Path, count: int) -> ExampleTable:
    """The first `count` pairs that `write_jsonl` wrote. Raises ValueError if there are fewer."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:count]
    if len(rows) < count:
        raise ValueError(f"{path} holds {len(rows)} pairs; {count} were asked for")
    pairs = [[row[f"{part}_ids"] for part in PARTS] for row in rows]
    return whole_table({path.name: MemoryExamples(pairs, path.name)})
