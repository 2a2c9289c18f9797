"""How fast completions are, next to `transformers.generate` on the same prompts, weights and threads of a CPU:

    python -m bench.generation
    python -m bench.generation --model SMOLLM2_FOLDER --data alpaca.jsonl.gz

Both take turns in one process, in float32 and greedy, with all prompts in one batch: ours first, then transformers with
PyTorch's default attention and its cache. Each is warm before its first turn. Without `stopping`, no token ends a
completion, so that all have `--tokens`. Tables have medians over the rounds; ratios are medians of those of each round.
It needs the extra `test`, which has PyTorch.
"""

import dataclasses
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from fsspec.core import url_to_fs

from bench.measure import ALLOCATOR, emit, host
from lora_dpo_jax.data.sources import RowFile
from lora_dpo_jax.generation import GenerationConfig, encode_prompts, generate, read_stop_ids
from lora_dpo_jax.huggingface.tokenizers import read_tokenizer
from lora_dpo_jax.huggingface.weights import load_model, read_config
from lora_dpo_jax.settings.arguments import parse

THREADS = 2
Complete = Callable[[list[list[int]]], list[list[int]]]


@dataclass(frozen=True)
class Options:
    model: str = "examples/quickstart/model"  # a folder
    data: str = "examples/quickstart/test.jsonl"  # pairs, `chosen` as messages: the first ones' prompts are completed
    prompts: int = 32
    tokens: int = 128  # of a completion, at most
    rounds: int = 5
    stopping: list[bool] = dataclasses.field(default_factory=lambda: [False, True])
    out: str | None = None


@dataclass(frozen=True)
class Turn:
    """What one system did in its turn."""

    completions: list[list[int]]
    seconds: float
    cpu_seconds: float

    @property
    def tokens(self) -> int:
        return sum(map(len, self.completions))

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens a second, and a processor second."""
        return self.tokens / self.seconds, self.tokens / self.cpu_seconds


def main() -> None:
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [*sys.orig_argv], {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(THREADS)})
    options = parse(Options)
    prompts = read_prompts(options)
    rows = [measure(options, prompts, stopping) for stopping in options.stopping]
    print(markdown(rows))
    emit({"model": options.model, "host": host(), "jax": jax.__version__, "rows": rows}, options.out)


def read_prompts(options: Options) -> list[list[int]]:
    filesystem, path = url_to_fs(options.data)
    rows = itertools.islice(RowFile(options.data, filesystem, path).rows(), options.prompts)
    return encode_prompts(read_tokenizer(Path(options.model)), [row["chosen"][:-1] for _, row in rows])


def measure(options: Options, prompts: list[list[int]], stopping: bool) -> dict[str, Any]:
    """The medians of one row of the table."""
    systems = {"ours": ours(options, prompts, stopping), "theirs": theirs(options, prompts, stopping)}
    rounds = [
        {name: _turn(name, complete, prompts) for name, complete in systems.items()} for _ in range(options.rounds)
    ]
    ratios = [[a / b for a, b in zip(turns["ours"].rates, turns["theirs"].rates, strict=True)] for turns in rounds]
    last = rounds[-1]
    return {
        "stopping": stopping,
        "tokens": last["ours"].tokens,
        **{
            f"{name}_{rate}": round(statistics.median(turns[name].rates[of] for turns in rounds), 1)
            for name in systems
            for of, rate in enumerate(("tokens_per_second", "tokens_per_cpu_second"))
        },
        "ratio": round(statistics.median(ratio for ratio, _ in ratios), 2),
        "cpu_ratio": round(statistics.median(ratio for _, ratio in ratios), 2),
        "equal_completions": sum(map(list.__eq__, last["ours"].completions, last["theirs"].completions)),
        "prompts": len(prompts),
        "load_average": round(os.getloadavg()[0], 2),
    }


def ours(options: Options, prompts: list[list[int]], stopping: bool) -> Complete:
    folder = Path(options.model)
    model = load_model(folder, read_config(folder), dtype=jnp.float32)
    config = GenerationConfig(max_new_tokens=options.tokens, batch_size=options.prompts)
    stop_ids = read_stop_ids(folder) if stopping else ()

    def complete(prompts: list[list[int]]) -> list[list[int]]:
        return generate(model, prompts, config, stop_ids=stop_ids)

    complete(prompts)
    return complete


def theirs(options: Options, prompts: list[list[int]], stopping: bool) -> Complete:
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    stop_ids = sorted(read_stop_ids(Path(options.model))) if stopping else None
    model.generation_config.eos_token_id = stop_ids
    run: Any = model  # its type hints lack `generate`
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}

    def complete(prompts: list[list[int]], tokens: int = options.tokens) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            found = run.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, **settings)
        return [_until(row, stop_ids or ()) for row in found[:, longest:].tolist()]

    complete(prompts, tokens=2)
    return complete


def _until(ids: list[int], stop_ids: Any) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))]


def _turn(name: str, complete: Complete, prompts: list[list[int]]) -> Turn:
    began = time.perf_counter(), time.process_time()
    completions = complete(prompts)
    turn = Turn(completions, time.perf_counter() - began[0], time.process_time() - began[1])
    print(f"{name}: {turn.seconds:.2f} s, {turn.cpu_seconds:.2f} CPU s", file=sys.stderr, flush=True)
    return turn


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| stopping | tokens | tokens/s | transformers | ratio | tokens/CPU s | transformers | ratio | equal |"]
    lines.append("|---" * 9 + "|")
    for row in rows:
        cells = [
            "on" if row["stopping"] else "off",
            f"{row['tokens']:,}",
            *(f"{row[f'{name}_tokens_per_second']:,.0f}" for name in ("ours", "theirs")),
            f"{row['ratio']:.1f}x",
            *(f"{row[f'{name}_tokens_per_cpu_second']:,.0f}" for name in ("ours", "theirs")),
            f"{row['cpu_ratio']:.1f}x",
            f"{row['equal_completions']} of {row['prompts']}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
