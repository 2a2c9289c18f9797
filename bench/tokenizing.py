"""Time of tokenizing with one process and with several, on rows with lengths like UltraFeedback's:

    python -m bench.tokenizing --data train.jsonl.gz --tokenizer MODEL_FOLDER

The texts are cut from the responses of a file of preferences in JSON lines. Prints JSON for each turn.
"""

import json
import os
import resource
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import emit
from lora_dpo_jax.data import ComponentConfig, FormatConfig, UrlSource, tokenize_component
from lora_dpo_jax.data.sources import expand_url
from lora_dpo_jax.huggingface.tokenizers import read_tokenizer
from lora_dpo_jax.settings.arguments import parse

# (median, sigma of its logarithm) of the tokens of a text, and its most tokens.
PROMPT, CHOSEN, REJECTED, MOST_TOKENS = (120, 0.95), (280, 0.70), (230, 0.75), 1600
CHARACTERS_PER_TOKEN = 4.4


@dataclass(frozen=True)
class Options:
    data: str  # JSON lines with `chosen` and `rejected`, lists of messages
    tokenizer: str  # a folder, with a chat template
    rows: int = 20_000
    processes: list[int] = field(default_factory=lambda: [1, 2])
    turns: int = 3
    out: str | None = None


def main() -> None:
    options = parse(Options)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(options, Path(folder) / "rows.jsonl")
        turns = [(turn, count) for turn in range(options.turns) for count in options.processes]
        results = [measure(options, Path(folder), turn, count) for turn, count in turns]
    emit({"rows": options.rows, "results": results}, options.out)


def write_rows(options: Options, path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = (row for file in expand_url(options.data) for _, row in file.rows())
    text = " ".join(row[name][-1]["content"] for row in rows for name in ("chosen", "rejected"))

    def cut(median: float, sigma: float) -> str:
        tokens = np.clip(rng.lognormal(np.log(median), sigma), 8, MOST_TOKENS)
        size = int(CHARACTERS_PER_TOKEN * tokens)
        start = int(rng.integers(0, len(text) - size))
        return text[start : start + size]

    with path.open("w", encoding="utf-8") as file:
        for _ in range(options.rows):
            prompt = {"role": "user", "content": cut(*PROMPT)}
            answers = {"chosen": cut(*CHOSEN), "rejected": cut(*REJECTED)}
            row = {name: [prompt, {"role": "assistant", "content": answer}] for name, answer in answers.items()}
            file.write(json.dumps(row) + "\n")


def measure(options: Options, folder: Path, turn: int, num_proc: int) -> dict[str, Any]:
    """Wall time, and the processor time of this process and of its workers, from an empty cache."""
    tokenizer = read_tokenizer(Path(options.tokenizer))
    component = ComponentConfig(UrlSource([str(folder / "rows.jsonl")]), FormatConfig(slice_strategy="drop"))
    cache, start, before = folder / f"cache-{turn}-{num_proc}", time.perf_counter(), cpu_seconds()
    tokenize_component(component, tokenizer, split="train", train_seq_len=4096, cache_dir=cache, num_proc=num_proc)
    seconds = time.perf_counter() - start
    own, workers = (after - earlier for after, earlier in zip(cpu_seconds(), before, strict=True))
    result = {"processes": num_proc, "seconds": seconds, "cpu_seconds": own, "cpu_seconds_of_workers": workers}
    result |= {"load": os.getloadavg()[0]}
    print(json.dumps(result), flush=True)
    return result


def cpu_seconds() -> tuple[float, float]:
    """Of this process, and of those that it started and that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own, workers = (usage.ru_utime + usage.ru_stime for usage in used)
    return own, workers


if __name__ == "__main__":
    main()
