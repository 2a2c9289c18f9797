"""Scores pairs under the policy and the reference, a line per pair.

python -m lora_dpo_jax.main.evaluate --config_path config/quickstart.yaml --adapter <PEFT folder> --output scores.jsonl
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm

from lora_dpo_jax.data.batches import PairTable, why_none_is_held_out
from lora_dpo_jax.data.sources import expand_url
from lora_dpo_jax.evaluation import summarize
from lora_dpo_jax.huggingface.adapters import read_adapter_config
from lora_dpo_jax.lora import equals_reference, frozen_copy
from lora_dpo_jax.losses import PairLogProbs
from lora_dpo_jax.main.command import command
from lora_dpo_jax.main.output_file import check_output, write_output
from lora_dpo_jax.places import refuse_impossible_paths
from lora_dpo_jax.printable import printable
from lora_dpo_jax.processes.exchange import is_first_process
from lora_dpo_jax.runs.identity import cache_folder, refuse_other_settings
from lora_dpo_jax.runs.outputs import check_writable
from lora_dpo_jax.runs.reference_scores import ReferenceLogProbs
from lora_dpo_jax.runs.setup import (
    TrainConfig,
    check_models,
    folder_of,
    keep_programs,
    load_base,
    load_peft_adapter,
    load_tables,
    load_tokenizer,
    placement_of,
    scorer,
)
from lora_dpo_jax.settings.arguments import parse_arguments

logger = logging.getLogger("lora_dpo_jax")

SCORES = ("logp_chosen", "logp_rejected", "ref_logp_chosen", "ref_logp_rejected", "chosen_tokens", "rejected_tokens")
COLUMNS = ("index", "origin", *SCORES, "prompt_tokens")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TrainConfig):
    """The configuration of a training run, and what to score with it."""

    output: str  # the .jsonl to write: index, logp_*, ref_logp_* (nats), *_tokens of each pair
    adapter: str | None = None  # a PEFT folder, URL or hub id: the policy; null: initialize_from_peft, or the base
    split: Literal["validation", "train"] = "validation"  # which pairs are scored

    def __post_init__(self):
        super().__post_init__()
        refuse_impossible_paths({"output": self.output, "adapter": self.adapter})
        if self.split not in ("validation", "train"):
            raise ValueError(f"split={self.split!r} must be validation or train")


def main(config: EvaluateConfig) -> dict[str, float]:
    """Writes the scores, prints the summary, and returns it."""
    refuse_other_settings(config)
    if is_first_process():
        check_writable("data.cache_dir", cache_folder(config))
        check_output(config.output, columns=COLUMNS, inputs=_data_files(config))
    keep_programs(config)
    check_models(config)
    if config.adapter is not None:
        read_adapter_config(folder_of("adapter", config.adapter))
    placement = placement_of(config)
    tokenizer = load_tokenizer(config)
    train, validation = load_tables(config, tokenizer)
    pairs = train if config.split == "train" else validation
    if not len(pairs):
        why = ""
        if config.split == "validation":
            why = f" ({why_none_is_held_out(train, config.held_out_fraction)})"
        raise ValueError(
            f"the {config.split} split has no pairs{why}: give data.components validation files, or raise "
            "validation_split_fraction"
        )
    base = load_base(config, tokenizer, placement)
    score = scorer(config, pairs, placement)

    def progress(batches, total: int):
        return tqdm(batches, "policy", total=total, unit=" batches", disable=not is_first_process())

    reference_model = policy_model = base.model
    if config.initialize_from_peft is not None:
        folder = folder_of("initialize_from_peft", config.initialize_from_peft)
        policy_model = load_peft_adapter(base.model, folder, placement, base_model=config.initialize_from_hf)
        if config.reference_adapter is not None:
            reference_model = policy_model
    if config.adapter is not None:
        folder = folder_of("adapter", config.adapter)
        policy_model = load_peft_adapter(base.model, folder, placement, base_model=config.initialize_from_hf)
    reference = ReferenceLogProbs(config, base, reference_model, placement).of_table(score)
    held_to = None if reference_model is base.model else frozen_copy(reference_model)
    policy = reference if equals_reference(policy_model, held_to) else score(policy_model, progress)

    summary = summarize(config.preference_loss, policy, reference)
    if is_first_process():
        write_output(config.output, _lines(policy, reference, pairs))
        _print(config, summary, len(pairs))
    return summary


def _data_files(config: EvaluateConfig) -> dict[str, list[str]]:
    """By the setting, the files that rows are read from. What cannot be read is reported when it is read."""
    files: dict[str, list[str]] = {}
    for name, component in config.data.components.items():
        for setting in ("train_urls", "validation_urls"):
            found = files.setdefault(f"data.components.{name}.source.{setting}", [])
            for url in getattr(component.source, setting, []):
                with suppress(Exception):
                    found += [file.name for file in expand_url(url)]
    return files


def _lines(policy: PairLogProbs, reference: PairLogProbs, pairs: PairTable) -> Iterable[dict]:
    scores = [policy.chosen, policy.rejected, reference.chosen, reference.rejected]
    scores += [policy.chosen_tokens, policy.rejected_tokens]
    arrays = {name: np.asarray(column.array) for name, column in zip(SCORES, scores, strict=True)}
    for index in range(len(pairs)):
        numbers = {name: array[index].item() for name, array in arrays.items()}
        numbers |= {name: int(numbers[name]) for name in ("chosen_tokens", "rejected_tokens")}
        prompt_tokens = int(pairs.lengths[index, 0])
        yield {"index": index, "origin": pairs.origin(index), **numbers, "prompt_tokens": prompt_tokens}


def _print(config: EvaluateConfig, summary: dict[str, float], num_pairs: int) -> None:
    print(f"{num_pairs:,} pairs of the {config.split} split")
    print(f"loss      {summary['loss']:.4f}")
    print(f"accuracy  {summary['dpo_accuracy']:.1%}   (a tie counts as half)")
    print(
        f"margin    {summary['rewards/margins']:.4f}   (chosen {summary['rewards/chosen']:.4f}, "
        f"rejected {summary['rewards/rejected']:.4f}, scaled by beta)"
    )
    print(f"scores    {printable(config.output)}")


def run() -> None:
    """The command `lora-dpo-evaluate`."""
    with command(lambda: parse_arguments(EvaluateConfig), lambda config: config.trainer.distributed) as config:
        main(config)


if __name__ == "__main__":
    run()
