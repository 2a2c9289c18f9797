"""Model cards: the README.md beside an export, with the metadata by which the Hugging Face hub lists it.

A card is the same text whenever the same run makes it: it has no dates, ids or speeds. It names no secret, and no
folder of the machine that trained.
"""

import html
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from lora_dpo_jax import __version__
from lora_dpo_jax.huggingface.tensors import abridged
from lora_dpo_jax.lora import LoraConfig
from lora_dpo_jax.places import is_url
from lora_dpo_jax.printable import printable
from lora_dpo_jax.redaction import without_secrets

CARD = "README.md"
BASE_CARD = "BASE_MODEL_README.md"  # the base's own card, in a merged model
HERE = "path/to/this/folder"
NO_NOTES: Mapping[str, str] = MappingProxyType({})
LICENSE_KEYS = ("license", "license_name", "license_link")
# Of vLLM, which reserves memory for the highest rank that it may meet.
VLLM_RANKS, VLLM_DEFAULT_RANK = (8, 16, 32, 64, 128, 256, 320, 512), 16
SPECIAL = re.compile(r"([\\`*_\[\]#|~$])")


@dataclass(frozen=True)
class DataSource:
    """One component of the data."""

    name: str
    places: Sequence[str]  # files, URLs or ids
    hub_id: str | None = None  # of a data set of the hub


@dataclass(frozen=True)
class Training:
    """How a run made its exports. The texts hold no secrets."""

    loss: str  # its type
    method: str = "dpo"  # one of TRL's tags: dpo, kto, sft, cpo, orpo
    noun: str = "pairs"  # for an example
    counts: tuple[int, int] = (0, 0)  # examples to train on, held-out ones
    sources: Sequence[DataSource] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # those that decide what is learned
    start: str | None = None  # the adapter that was trained further
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # held-out ones, by their time
    license: Mapping[str, str] = field(default_factory=dict)  # of the base, by the keys of the hub's metadata


def model_card(
    base_model: str,
    config: LoraConfig,
    targets: Sequence[str],
    notes: Mapping[str, str] = NO_NOTES,
    *,
    revision: str | None = None,
    training: Training | None = None,
    repo: str | None = None,
) -> str:
    """The card of an adapter. `notes` are lines of text by title; `repo` is the adapter's own id on the hub."""
    metadata = _metadata(base_model, "adapter", "peft", training, ["lora", "transformers"])
    variant = ", rank-stabilized scaling" if config.use_rslora else ""
    variant += ", DoRA" if config.use_dora else ""
    facts = [f"rank {config.r}, alpha {config.alpha:g}{variant}", f"targets: {_code(abridged(list(targets)))}"]
    usage = _adapter_usage(_loadable(base_model), revision, config, repo or HERE)
    return _card(metadata, f"LoRA adapter for {_named(base_model, revision)}", facts, usage, notes, training)


def merged_card(
    base_model: str,
    config: LoraConfig,
    notes: Mapping[str, str] = NO_NOTES,
    *,
    revision: str | None = None,
    training: Training | None = None,
    repo: str | None = None,
) -> str:
    """The card of a model with an adapter merged into its weights."""
    metadata = _metadata(base_model, "finetune", "transformers", training, [])
    facts = [f"the base's weights, with a LoRA adapter of rank {config.r} merged into them"]
    usage = _merged_usage(repo or HERE)
    return _card(metadata, f"{_named(base_model, revision)} with a merged LoRA adapter", facts, usage, notes, training)


def license_in(folder: Path) -> dict[str, str]:
    """The license that a model's own card states; empty if there is no card, or none in it."""
    from huggingface_hub.repocard import metadata_load  # late: it takes long to import

    try:
        stated = metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: stated[key] for key in LICENSE_KEYS if isinstance(stated.get(key), str)}


def public_name(place: str) -> str:
    """A path, URL or hub id as others may see it: a URL without secrets, a path without the folders above."""
    if is_url(place) and not place.startswith(("file://", "local://")):
        return without_secrets(place)
    return place if _is_hub_id(place) else PurePosixPath(place.rstrip("/")).name


def _metadata(
    base_model: str, relation: str, library: str, training: Training | None, tags: list[str]
) -> dict[str, Any]:
    """The hub's metadata. Its checks refuse a base or a data set that is no id."""
    if is_known := _is_hub_id(base_model):
        tags = [f"base_model:{relation}:{base_model}", *tags]
    datasets = [source.hub_id for source in training.sources if source.hub_id] if training else []
    return {
        **({"base_model": base_model, "base_model_relation": relation} if is_known else {}),
        **({"datasets": list(dict.fromkeys(datasets))} if datasets else {}),
        "library_name": library,
        **(training.license if training else {}),
        "pipeline_tag": "text-generation",
        # As TRL and PEFT tag what they train, because the hub's searches and widgets go by these tags.
        "tags": sorted({*tags, "lora_dpo_jax", *(["trl", training.method] if training else ["dpo"])}),
    }


def _card(
    metadata: Mapping[str, Any],
    title: str,
    facts: Sequence[str],
    usage: str,
    notes: Mapping[str, str],
    training: Training | None,
) -> str:
    made = f"Trained with the loss {_code(training.loss)} by `lora_dpo_jax`." if training else "Made by `lora_dpo_jax`."
    versions = [f"lora_dpo_jax {__version__}", *(f"{name} {version(name)}" for name in ("jax", "transformers"))]
    front = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---\n",
        f"# {title}\n",
        f"{made}\n",
        "\n".join(f"- {fact}" for fact in [*facts, *(f"{_text(name)}: {_text(text)}" for name, text in notes.items())]),
        f"\n## How to load it\n\n{usage}",
        *(_sections(training) if training else []),
        "\n## Versions\n",
        ", ".join(versions) + "\n",
    ]
    return "\n".join(parts)


def _sections(training: Training) -> list[str]:
    trained, held_out = training.counts
    counts = f"{trained:,} {training.noun} to train on, {held_out:,} held out."
    start = [f"Continues the adapter {_code(training.start)}.\n"] if training.start else []
    settings = yaml.safe_dump(dict(training.settings), sort_keys=False, allow_unicode=True)
    return [
        *([f"\n## Held-out {training.noun}\n", _table(training.scores)] if training.scores else []),
        "\n## Data\n",
        *(f"- {_code(source.name)}: {_places(source)}" for source in training.sources),
        f"\n{counts}\n",
        "## Settings\n",
        *start,
        _fenced(settings, "yaml"),
    ]


def _places(source: DataSource) -> str:
    if source.hub_id:
        return f"[{_code(source.hub_id)}](https://huggingface.co/datasets/{source.hub_id})"
    return ", ".join(map(_code, source.places))


def _table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each metric, a column for each time."""
    names = list(dict.fromkeys(name for column in scores.values() for name in column))
    rows = [["metric", *map(_text, scores)], ["---", *["---:"] * len(scores)]]
    for name in names:
        values = [column.get(name, math.nan) for column in scores.values()]
        rows.append([_code(name).replace("|", "\\|"), *(f"{value:.4g}" for value in values)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _adapter_usage(base: str, revision: str | None, config: LoraConfig, here: str) -> str:
    pinned = f", revision={json.dumps(revision)}" if revision else ""
    python = f"""\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}{pinned})
model = PeftModel.from_pretrained(base, {json.dumps(here)})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(here)})
"""
    rank = max([config.r, *config.rank_pattern.values()])
    enough = next((most for most in VLLM_RANKS if most >= rank), rank)
    wide = f" --max-lora-rank {enough}" if rank > VLLM_DEFAULT_RANK else ""
    at = f" --revision {shlex.quote(revision)}" if revision else ""
    shell = f"vllm serve {shlex.quote(base)}{at} --enable-lora{wide} --lora-modules dpo={shlex.quote(here)}\n"
    # vLLM has neither DoRA nor trained rows of the embedding.
    served = "" if config.use_dora or config.trainable_token_indices else shell
    shell = f"{served}lora-dpo-generate --model {shlex.quote(base)} --adapter {shlex.quote(here)} --prompt 'Why?'\n"
    return f"{_fenced(python, 'python')}\n\n{_fenced(shell, 'bash')}"


def _merged_usage(here: str) -> str:
    python = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(here)})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(here)})
"""
    shell = f"vllm serve {shlex.quote(here)}\nlora-dpo-generate --model {shlex.quote(here)} --prompt 'Why?'\n"
    return f"{_fenced(python, 'python')}\n\n{_fenced(shell, 'bash')}"


def _loadable(base_model: str) -> str:
    """The base in a command that others run."""
    name = public_name(base_model)
    return name if _is_hub_id(base_model) or is_url(name) else f"path/to/{name}"


def _named(base_model: str, revision: str | None) -> str:
    at = f" at {_code(revision)}" if revision else ""
    return f"{_code(public_name(base_model))}{at}"


def _is_hub_id(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _line(text: str) -> str:
    return printable(" ".join(text.split()))


def _code(text: str) -> str:
    """A code span, in which Markdown and HTML mean nothing: its fence is longer than any in the text."""
    text = _line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _text(text: str) -> str:
    """Text in which Markdown and HTML mean nothing."""
    return html.escape(SPECIAL.sub(r"\\\1", _line(text)), quote=False)


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{printable(text)}{fence}"
