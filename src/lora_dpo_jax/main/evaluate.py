"""Scores pairs under the policy and the reference, a line per pair.

python -m lora_dpo_jax.main.evaluate --config_path config/quickstart.yaml --adapter <PEFT folder> --output scores.jsonl
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from lora_dpo_jax.data.loader import PairTable
from lora_dpo_jax.evaluation import summarize
from lora_dpo_jax.huggingface.adapters import read_adapter_config
from lora_dpo_jax.losses import PairLogProbs
from lora_dpo_jax.main.command import command
from lora_dpo_jax.main.identity import cache_folder, refuse_other_settings
from lora_dpo_jax.main.outputs import check_writable
from lora_dpo_jax.main.reference import ReferenceLogProbs
from lora_dpo_jax.main.setup import (
    TrainConfig,
    check_models,
    folder_of,
    keep_programs,
    load_base,
    load_peft_adapter,
    load_tables,
    load_tokenizer,
    parse_arguments,
    scorer,
)
from lora_dpo_jax.sharding import Placement
from lora_dpo_jax.training.distributed import is_first_process

logger = logging.getLogger("lora_dpo_jax")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TrainConfig):
    """The configuration of a training run, and what to score with it."""

    output: str  # the .jsonl to write: index, logp_*, ref_logp_* (nats), *_tokens of each pair
    adapter: str | None = None  # a PEFT folder, URL or hub id: the policy; null: initialize_from_peft, or the base
    split: Literal["validation", "train"] = "validation"

    def __post_init__(self):
        super().__post_init__()
        if self.split not in ("validation", "train"):
            raise ValueError(f"split={self.split!r} must be validation or train")


def main(config: EvaluateConfig) -> dict[str, float]:
    """Writes the scores, prints the summary, and returns it."""
    refuse_other_settings(config)
    if is_first_process():
        check_writable("data.cache_dir", cache_folder(config))
        check_writable("output", Path(config.output).parent)
    keep_programs(config)
    check_models(config)
    if config.adapter is not None:
        read_adapter_config(folder_of("adapter", config.adapter))
    tokenizer = load_tokenizer(config)
    train, validation = load_tables(config, tokenizer)
    pairs = train if config.split == "train" else validation
    if not len(pairs):
        raise ValueError(
            f"the {config.split} split has no pairs: give data.components validation files, or a "
            "validation_split_fraction"
        )
    placement = Placement(config.trainer.mesh)
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
    policy = reference if policy_model is reference_model else score(policy_model, progress)

    summary = summarize(config.preference_loss, policy, reference)
    if is_first_process():
        _write(Path(config.output), policy, reference, pairs)
        _print(config, summary, len(pairs))
    return summary


def _write(path: Path, policy: PairLogProbs, reference: PairLogProbs, pairs: PairTable) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for line in _lines(policy, reference, pairs):
            file.write(json.dumps(line) + "\n")


def _lines(policy: PairLogProbs, reference: PairLogProbs, pairs: PairTable) -> Iterable[dict]:
    columns = {
        "logp_chosen": policy.chosen,
        "logp_rejected": policy.rejected,
        "ref_logp_chosen": reference.chosen,
        "ref_logp_rejected": reference.rejected,
        "chosen_tokens": policy.chosen_tokens,
        "rejected_tokens": policy.rejected_tokens,
    }
    arrays = {name: np.asarray(column.array) for name, column in columns.items()}
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
    print(f"scores    {config.output}")


if __name__ == "__main__":
    with command(lambda: parse_arguments(EvaluateConfig), lambda config: config.trainer.distributed) as config:
        main(config)
