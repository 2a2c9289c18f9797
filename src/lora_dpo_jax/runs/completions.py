"""The completions of systems: read from files, or made by their models once and kept.

    {"key": "90ab...", "prompt": "Why?", "completion": "Because."}

The key is a hash of everything that decides the completion. A file that `generate` wrote is read as well.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from lora_dpo_jax.data.sources import RowFile
from lora_dpo_jax.files import replace_file
from lora_dpo_jax.generation import GenerationConfig
from lora_dpo_jax.places import spelled_alike
from lora_dpo_jax.runs.prompts import Prompt, row_prompt
from lora_dpo_jax.runs.systems import ModelSystems, SystemConfig

LINE = ("key", "prompt", "completion")  # the keys of a line


def completions_of(
    systems: Mapping[str, SystemConfig],
    prompts: Sequence[Prompt],
    generation: GenerationConfig,
    *,
    folder: Path,
    memory: Path,
) -> dict[str, list[str]]:
    """The completion of each prompt, by the name of the system. Weights that systems share are read once.

    Those of models are kept in `folder`/<name>.jsonl, and used again while model, prompts and `generation` are the
    same. Digests of weights are kept in `memory`.
    """
    found = {
        name: matched(f"{name}.completions_file", config.completions_file, prompts)
        for name, config in systems.items()
        if config.completions_file is not None
    }
    new: list[ModelSystems] = []
    files: dict[str, tuple[str, list[str]]] = {}  # (name, keys) by setting
    for name, config in systems.items():
        if name in found:
            continue
        system = find_system(name, config)
        system.encode(prompts)  # so that a prompt that a template rejects is an early error
        ((setting, identity),) = system.identities(memory).items()
        keys = [_key(identity, generation, prompt, number) for number, prompt in enumerate(prompts)]
        if (kept := _kept(folder / f"{name}.jsonl", keys)) is not None:
            found[name] = kept
            continue
        files[setting] = name, keys
        joined = new[-1].joined(system) if new else None
        new[-1:] = [*new[-1:], system] if joined is None else [joined]
    for system in new:
        for setting, completions in system.completions(prompts, generation):
            name, keys = files[setting]
            _keep(folder / f"{name}.jsonl", keys, prompts, completions)
            found[name] = completions
    return {name: found[name] for name in systems}


def find_system(name: str, config: SystemConfig) -> ModelSystems:
    """The model of a system whose settings lie in the section `name`. Raises ValueError or FileNotFoundError."""
    if config.model is None:
        raise ValueError(f"{name}.model is missing: it is the model that answers, or the base of {name}.adapter")
    return ModelSystems.find(
        (f"{name}.model", config.model),
        {f"{name}.adapter": config.adapter},
        revision=config.revision,
        tokenizer=(f"{name}.tokenizer", config.tokenizer),
        dtype=config.dtype,
        quantization=config.quantization or "none",
    )


def completion_prompts(setting: str, url: str) -> list[Prompt]:
    """The prompts of a file of completions."""
    return [Prompt(content, origin) for origin, content, _ in _rows(setting, url)]


def matched(setting: str, url: str, prompts: Sequence[Prompt]) -> list[str]:
    """The completion of each prompt in a file, whose rows may have any order.

    Raises ValueError if a prompt has none there, or several.
    """
    found: dict[str, tuple[str, str]] = {}
    for origin, content, completion in _rows(setting, url):
        key = Prompt(content, origin).key
        if key in found:
            raise ValueError(
                f"{origin}: is a second completion of the prompt of {found[key][0]}: leave one of them out"
            )
        found[key] = origin, completion
    missing = [prompt for prompt in prompts if prompt.key not in found]
    if missing:
        raise ValueError(
            f"{setting}={url!r} has no completion for {len(missing):,} of {len(prompts):,} prompts; the first of them "
            f"is {missing[0].origin}: {missing[0].readable[:80]!r}"
        )
    return [found[prompt.key][1] for prompt in prompts]


def _rows(setting: str, url: str) -> Iterator[tuple[str, Any, str]]:
    """(origin, prompt, completion) of each row. Raises ValueError if there is none."""
    filesystem, path = url_to_fs(url)
    if not filesystem.isfile(path):
        raise FileNotFoundError(f"{setting}={url!r} is not a file{spelled_alike(url)}")
    is_empty = True
    for number, row in RowFile(url, filesystem, path).rows():
        is_empty, origin = False, f"{setting}={url!r}, row {number}"
        prompt = row_prompt(row, origin)
        completion = row.get("completion")
        if not isinstance(completion, str):
            raise ValueError(f"{origin}: needs `completion`, a string; found {sorted(row)}")
        yield origin, prompt, completion
    if is_empty:
        raise ValueError(f"{setting}={url!r} holds no completions")


def _key(identity: Mapping[str, Any], generation: GenerationConfig, prompt: Prompt, number: int) -> str:
    settings = {name: value for name, value in asdict(generation).items() if name != "batch_size"}
    place = number if generation.temperature else None  # samples depend on the number of their prompt
    parts = [identity, settings, prompt.content, prompt.chat, prompt.template_kwargs, place]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _kept(path: Path, keys: Sequence[str]) -> list[str] | None:
    """The completions with these keys; None if the file is not there or holds others."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        is_same = [row["key"] for row in rows] == list(keys)
        return [str(row["completion"]) for row in rows] if is_same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, keys: Sequence[str], prompts: Sequence[Prompt], completions: Sequence[str]) -> None:
    lines = [
        json.dumps({"key": key, "prompt": prompt.content, "completion": completion}, ensure_ascii=False) + "\n"
        for key, prompt, completion in zip(keys, prompts, completions, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(lines).encode("utf-8", "backslashreplace"))
