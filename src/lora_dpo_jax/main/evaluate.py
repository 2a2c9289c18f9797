"""Scores pairs under the policy and the reference, and writes one line per pair.

python -m lora_dpo_jax.main.evaluate --config_path config/quickstart.yaml --adapter <PEFT folder> --output scores.jsonl
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from lora_dpo_jax.columns import DESIRABLE, LABEL
from lora_dpo_jax.data.sources import expand_url
from lora_dpo_jax.data.table import ExampleTable, why_none_is_held_out
from lora_dpo_jax.evaluation import evaluate_by_sums, evaluate_by_tokens
from lora_dpo_jax.files import cache_folder
from lora_dpo_jax.huggingface.adapter_config import read_adapter_config
from lora_dpo_jax.lora import equals_reference, frozen_copy
from lora_dpo_jax.losses import Scores
from lora_dpo_jax.main.command import command
from lora_dpo_jax.main.output_file import check_output, write_output
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.places import refuse_impossible_paths
from lora_dpo_jax.printable import printable
from lora_dpo_jax.processes.exchange import is_first_process
from lora_dpo_jax.runs.assembly import Data, load_data, pair_scorer, placement_of, reference_log_probs
from lora_dpo_jax.runs.base import Base, adapter_of, check_models, load_base, load_peft_adapter
from lora_dpo_jax.runs.compiled_programs import keep_compiled_programs
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.runs.held_out import baselines_over, statistics_over, table
from lora_dpo_jax.runs.identity import refuse_other_settings
from lora_dpo_jax.runs.outputs import check_writable
from lora_dpo_jax.settings.arguments import parse_arguments
from lora_dpo_jax.sharding import Placement

logger = logging.getLogger("lora_dpo_jax")

SCORES = ("logp_chosen", "logp_rejected", "ref_logp_chosen", "ref_logp_rejected", "chosen_tokens", "rejected_tokens")
LISTS = ("logps", "ref_logps", "response_tokens")
OF_ANSWER = ("logp", "ref_logp", "completion_tokens")
OF_ONE_MODEL = ("logp", "completion_tokens")  # where the loss needs no reference and nothing is compared
# The keys of a line: of pairs, of other comparisons, and of single answers with a label or without one.
NUMBERS = (SCORES, LISTS, *((*label, *names) for label in (("label",), ()) for names in (OF_ANSWER, OF_ONE_MODEL)))
LINES = tuple(("index", "origin", *names, "prompt_tokens") for names in NUMBERS)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TrainConfig):
    """The configuration of a training run, and what to score with it."""

    output: str  # the .jsonl to write: index, logp_*, ref_logp_* (nats), *_tokens of each pair
    adapter: str | None = None  # a PEFT folder, URL or hub id: the policy; null: initialize_from_peft, or the base
    split: Literal["validation", "train"] = "validation"  # which pairs are scored

    def __post_init__(self):
        super().__post_init__()
        refuse_impossible_paths({"output": self.output, "adapter": self.adapter})


def main(config: EvaluateConfig) -> dict[str, float]:
    """Writes the scores, prints the metrics and the baselines, and returns both."""
    refuse_other_settings(config)
    cache = cache_folder(config.data.cache_dir)
    if is_first_process():
        check_writable("data.cache_dir", cache)
        check_output(config.output, lines=LINES, inputs=_data_files(config))
    keep_compiled_programs(config.trainer.jax_compilation_cache_dir, cache)
    check_models(config)
    if config.adapter is not None:
        read_adapter_config(adapter_of("adapter", config.adapter))
    placement = placement_of(config)
    data = load_data(config)
    pairs = _pairs(config, data)
    base = load_base(config, data.tokenizer, placement, adapter=config.adapter)
    pairs = pairs.switching_at(base.config.switch_length)
    policy, reference, metrics, baselines = _score(config, base, pairs, placement)
    if is_first_process():
        write_output(config.output, _lines(policy, reference, pairs))
        _print(config, metrics, baselines, f"{len(pairs):,} {pairs.arrays.noun}")
    return metrics | baselines


def _pairs(config: EvaluateConfig, data: Data) -> ExampleTable:
    """The pairs of `split`. Raises ValueError if there are none."""
    pairs = data.pairs if config.split == "train" else data.held_out
    if not len(pairs):
        why = ""
        if config.split == "validation":
            why = f" ({why_none_is_held_out(data.pairs, config.held_out_fraction)})"
        raise ValueError(
            f"the {config.split} split has no pairs{why}: give data.components validation files, or raise "
            "validation_split_fraction"
        )
    return pairs


def _score(
    config: EvaluateConfig, base: Base, pairs: ExampleTable, placement: Placement
) -> tuple[Scores, Scores | None, dict[str, float], dict[str, float]]:
    """(log-probs of the policy; of the reference, if anything reads them; metrics; baselines)."""

    def progress(batches, total: int):
        return tqdm(batches, "policy", total=total, unit=" batches", disable=not is_first_process())

    score, loss = pair_scorer(pairs, trainer=config.trainer, placement=placement), config.preference_loss
    policy_model, reference_model = _models(config, base, placement)
    held_to = None if reference_model is base.model else frozen_copy(reference_model)
    policy = reference = None
    if loss.needs_reference or pairs.arrays.comparison_counts.any():
        reference = reference_log_probs(config, base, reference_model, placement).of_table(score)
        policy = reference if equals_reference(policy_model, held_to) else None
    policy = score(policy_model, progress) if policy is None else policy
    if config.objective.needs_tokens:
        columns = loss.columns_in(pairs.arrays.columns)
        found = evaluate_by_tokens(config.objective, columns, score, policy_model, held_to)
    else:
        found = evaluate_by_sums(loss, policy, reference, pairs)
    baselines = baselines_over(pairs, reference)
    return policy, reference, found.means | statistics_over(pairs, found), baselines


def _models(config: EvaluateConfig, base: Base, placement: Placement) -> tuple[CausalLM, CausalLM]:
    """The policy and the reference."""
    policy = reference = base.model
    if config.initialize_from_peft is not None:
        policy = load_peft_adapter(base, "initialize_from_peft", config.initialize_from_peft, placement)
        if config.reference_adapter is not None:
            reference = policy
    if config.adapter is not None:
        policy = load_peft_adapter(base, "adapter", config.adapter, placement)
    return policy, reference


def _data_files(config: EvaluateConfig) -> dict[str, list[str]]:
    """The files that rows are read from, by their setting. The reader reports those that cannot be read, later."""
    files: dict[str, list[str]] = {}
    for name, component in config.data.components.items():
        for setting in ("train_urls", "validation_urls"):
            found = files.setdefault(f"data.components.{name}.source.{setting}", [])
            for url in getattr(component.source, setting, []):
                with suppress(Exception):
                    found += [file.name for file in expand_url(url)]
    return files


def _lines(policy: Scores, reference: Scores | None, examples: ExampleTable) -> Iterable[dict]:
    """Of pairs and of single answers, each number has its own name. Other examples have lists."""
    labels = examples.arrays.columns.get(LABEL)
    are_single = labels is not None or bool((examples.arrays.response_counts == 1).all())
    scores = [policy.log_probs, *([] if reference is None else [reference.log_probs]), policy.tokens]
    arrays = [np.asarray(x.array) for x in scores]
    of_answer = OF_ONE_MODEL if reference is None else OF_ANSWER
    for index in range(len(examples)):
        responses = examples.arrays.responses_of(np.array([index]))
        mine = [array[responses].tolist() for array in arrays]
        if are_single:  # a second response is the answer to another prompt
            numbers: dict[str, Any] = dict(zip(of_answer, (values[0] for values in mine), strict=True))
            if labels is not None:
                numbers = {"label": bool(labels.values[responses[0]] == DESIRABLE), **numbers}
        elif examples.arrays.are_pairs:
            numbers = dict(zip(SCORES, (number for pair in mine for number in pair), strict=True))
        prompt_tokens = int(examples.sizes.prompt[index])
        yield {"index": index, "origin": examples.origin(index), **numbers, "prompt_tokens": prompt_tokens}


def _print(config: EvaluateConfig, metrics: dict[str, float], baselines: dict[str, float], examples: str) -> None:
    print(f"{examples} of the {config.split} split")
    scored_by = "the base" if config.reference_adapter is None else "initialize_from_peft"
    print("\n".join(table("", {"policy": metrics}, baselines, scored_by=scored_by)))
    if "dpo_accuracy" in metrics:
        print(
            "A tie counts as half. Rewards are scaled by beta: chosen "
            f"{metrics['rewards/chosen']:.4f}, rejected {metrics['rewards/rejected']:.4f}"
        )
    print(f"scores    {printable(config.output)}")


def run() -> None:
    """The command `lora-dpo-evaluate`."""
    with command(lambda: parse_arguments(EvaluateConfig), lambda config: config.trainer.distributed) as config:
        main(config)


if __name__ == "__main__":
    run()
