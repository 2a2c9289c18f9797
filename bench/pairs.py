"""The pairs that are measured: drawn by a length profile, or read from a file of preferences."""

import json
from collections.abc import Sequence
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
    data: str, count: int, *, vocab_size: int, tokenizer: str | None = None, cap: int | None = None
) -> ExampleTable:
    """`count` pairs of a profile, or the first ones of a file (jsonl or parquet, tokenized with `tokenizer`'s folder).

    `cap` (tokens of prompt + one response) drops longer rows of a file. Raises ValueError if the file has too few.
    """
    if data in PROFILES:
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
    rng = np.random.default_rng(seed)

    def length(of: Length, shortest: int, longest: int) -> int:
        return int(np.clip(rng.lognormal(np.log(of.median), of.sigma), shortest, longest))

    def ids(number: int) -> list[int]:
        drawn = rng.integers(FIRST_ID, LAST_ID, number)
        return (FIRST_ID + (drawn - FIRST_ID) % (min(vocab_size, LAST_ID) - FIRST_ID)).tolist()

    pairs = []
    for _ in range(count):
        prompt = length(profile.prompt, profile.shortest_prompt, profile.longest_prompt)
        chosen, rejected = (length(of, 4, profile.cap - prompt) for of in (profile.chosen, profile.rejected))
        parts = [BOS, *ids(prompt - 1)], [*ids(chosen - 1), EOS], [*ids(rejected - 1), EOS]
        pairs.append(TokenizedExample.pair(*(np.array(part, np.int32) for part in parts)))
    return pairs


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
