"""Several completions of each prompt: sampled, and recorded as they come, or given in a file."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fsspec.core import url_to_fs

from lora_dpo_jax.data.sources import RowFile
from lora_dpo_jax.generation import GenerationConfig, generate
from lora_dpo_jax.json_objects import is_number
from lora_dpo_jax.judging.pairing import Completion
from lora_dpo_jax.judging.record import KEY, Record
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.places import spelled_alike
from lora_dpo_jax.runs.prompts import Prompt, row_prompt

# So many batches are sampled before their completions are recorded.
BATCHES_PER_CHUNK = 8
CHUNK = 512  # requests, where the batch's size is chosen by memory
# The keys of a recorded line.
LINE = (KEY, "prompt", "sample", "completion", "tokens", "is_finished")


@dataclass(frozen=True)
class Request:
    """One sample of one prompt."""

    prompt: int  # its number
    sample: int  # its number among those of the prompt
    ids: Sequence[int]  # the tokens of the prompt
    key: str  # of all that decides the completion

    @property
    def stream(self) -> int:
        """The random stream, which no other prompt changes."""
        return int(_digest([list(self.ids), self.sample])[:8], 16)


@dataclass(frozen=True)
class Sampled:
    """How much was sampled, without what was recorded before."""

    completions: int = 0
    tokens: int = 0
    seconds: float = 0.0


def requests(prompts: Sequence[Sequence[int]], count: int, identity: Mapping[str, Any]) -> list[Request]:
    """`count` of each prompt, given by its tokens. `identity`: all else that decides completions, as plain values."""
    of_all = _digest(identity)
    return [
        Request(number, sample, ids, _digest([of_all, list(ids), sample]))
        for number, ids in enumerate(prompts)
        for sample in range(count)
    ]


def sample(
    model: CausalLM,
    tokenizer: Any,
    wanted: Sequence[Request],
    config: GenerationConfig,
    record: Record,
    *,
    stop_ids: Collection[int],
    prompts: Sequence[Any],
    progress: Callable = lambda chunks: chunks,
) -> Sampled:
    """Samples those requests that are not recorded, and records them. `prompts` are written beside them, for people.

    Requests are computed in chunks that depend on nothing but `wanted`. So a command that was killed computes the
    missing ones in the same batches as one that was not, and finds the same completions, bit for bit.
    """
    size = BATCHES_PER_CHUNK * config.batch_size if config.batch_size else CHUNK
    completions, tokens, began = 0, 0, time.perf_counter()
    chunks = [wanted[first : first + size] for first in range(0, len(wanted), size)]
    for chunk in progress([chunk for chunk in chunks if any(request.key not in record for request in chunk)]):
        streams = [request.stream for request in chunk]
        found = generate(model, [request.ids for request in chunk], config, stop_ids=stop_ids, streams=streams)
        record.add([_line(*pair, tokenizer, config, prompts) for pair in zip(chunk, found, strict=True)])
        completions, tokens = completions + len(chunk), tokens + sum(map(len, found))
    return Sampled(completions, tokens, time.perf_counter() - began)


def recorded(wanted: Sequence[Request], record: Record) -> list[list[Completion]]:
    """The completions of each prompt."""
    found: list[list[Completion]] = [[] for _ in range(1 + max((request.prompt for request in wanted), default=-1))]
    for request in wanted:
        line = record[request.key]
        found[request.prompt].append(Completion(line["completion"], line["is_finished"]))
    return found


def given(url: str, score_field: str | None, *, chat: bool) -> tuple[list[Prompt], list[list[Completion]]]:
    """(prompts, the completions of each) of a .jsonl file with `prompt` and `completion` in each row.

    Rows with equal prompts are one prompt's. The column `score_field` has the scores, if it is not None. A column
    `is_finished` may say that a completion was cut. Raises FileNotFoundError, or ValueError with the row.
    """
    filesystem, path = url_to_fs(url)
    if not filesystem.isfile(path):
        raise FileNotFoundError(f"completions_file={url!r} is not a file{spelled_alike(url)}")
    found: dict[str, tuple[Prompt, list[Completion]]] = {}
    for number, row in RowFile(url, filesystem, path).rows():
        origin = f"completions_file={url!r}, row {number}"
        prompt = Prompt(row_prompt(row, origin), origin, chat)
        text, is_finished = row.get("completion"), row.get("is_finished", True)
        if not isinstance(text, str) or not isinstance(is_finished, bool):
            raise ValueError(f"{origin}: needs `completion`, a string; `is_finished`, if it is there, is true or false")
        score = math.nan if score_field is None else _score(row, score_field, origin)
        found.setdefault(prompt.key, (prompt, []))[1].append(Completion(text, is_finished, score))
    if not found:
        raise ValueError(f"completions_file={url!r} holds no completions")
    return [prompt for prompt, _ in found.values()], [completions for _, completions in found.values()]


def _score(row: Mapping[str, Any], name: str, origin: str) -> float:
    value: Any = row.get(name)
    if not is_number(value) or not math.isfinite(value):
        found = f"found {value!r}" if name in row else f"its columns are {sorted(row)}"
        raise ValueError(f"{origin}: needs a finite number in the column that scorer.field={name} names; {found}")
    return float(value)


def _line(
    request: Request, ids: list[int], tokenizer: Any, config: GenerationConfig, prompts: Sequence[Any]
) -> dict[str, Any]:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    # A stop token is not among `ids`, so a completion that ended by itself is shorter.
    values = (request.key, prompts[request.prompt], request.sample, text, len(ids), len(ids) < config.max_new_tokens)
    return dict(zip(LINE, values, strict=True))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
