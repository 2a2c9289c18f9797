"""A run, assembled once from its config: its data, its steps, and the learner that takes them."""

from dataclasses import dataclass
from typing import Any

import jax

from lora_dpo_jax.data.cache import load_examples
from lora_dpo_jax.data.mismatched import with_mismatched_answers
from lora_dpo_jax.data.order import ExampleOrder, StepIds
from lora_dpo_jax.data.shapes import tokens_while_compiling
from lora_dpo_jax.data.table import ExampleTable, split_by_prompt, whole_table, why_none_is_held_out
from lora_dpo_jax.evaluation import Scorer
from lora_dpo_jax.files import cache_folder
from lora_dpo_jax.lora import LoraConfig, frozen_copy
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.models.attention import PLATFORMS
from lora_dpo_jax.models.quantization import parameter_count
from lora_dpo_jax.processes.exchange import in_turns, is_first_process
from lora_dpo_jax.reference_cache import ReferenceCache
from lora_dpo_jax.runs.base import Base, load_base, load_policy, load_tokenizer, lora_config, placed_adapters
from lora_dpo_jax.runs.best import refuse_unknown_metric
from lora_dpo_jax.runs.checks import refuse_unfit_data
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.runs.eva import with_eva
from lora_dpo_jax.runs.exports import with_trained_template
from lora_dpo_jax.runs.held_out import metric_names
from lora_dpo_jax.runs.identity import reference_identity, refuse_other_steps
from lora_dpo_jax.runs.learner import Learner, real_learner
from lora_dpo_jax.runs.reference_scores import ReferenceLogProbs
from lora_dpo_jax.runs.steps import Steps, lay_out_steps, pair_order
from lora_dpo_jax.sharding import Placement
from lora_dpo_jax.training.loop import TrainerConfig


@dataclass(frozen=True)
class Data:
    """The pairs of a run, and the tokenizer that made them."""

    tokenizer: Any
    pairs: ExampleTable  # to train on
    held_out: ExampleTable

    def switching_at(self, length: int | None) -> "Data":
        """The same data, for a model whose sequences are computed otherwise beyond `length` tokens."""
        return Data(self.tokenizer, self.pairs.switching_at(length), self.held_out.switching_at(length))


@dataclass(frozen=True)
class Run:
    """Everything that a run trains with, before its first step."""

    data: Data
    base: Base
    lora: LoraConfig  # of the given adapter if there is one, else `lora` of the config
    order: ExampleOrder
    steps: Steps
    learner: Learner


def assemble(config: TrainConfig, placement: Placement) -> Run:
    """Reads the data and the weights. All processes must call this; ValueError if their data or steps differ."""
    trainer = config.trainer
    lora, data = lora_config(config), load_data(config)
    if not len(data.pairs):
        raise ValueError("data.components: no training pair is left; see the counts above")
    if trainer.best.metric is not None:
        _check_choice(config, data)
    base = load_base(config, with_trained_template(config.data, data.tokenizer), placement)
    data = data.switching_at(base.config.switch_length)
    k_adapters, k_dropout = jax.random.split(jax.random.key(trainer.seed))
    policy = load_policy(config, lora, base, placement, key=k_adapters)
    order = pair_order(data.pairs, seed=trainer.seed, shuffle=config.data.shuffle, weights=config.data.train_weights)
    num_steps = trainer.steps(order.epoch)
    trainer.check_evaluations(num_steps)
    ids = StepIds(order, trainer.train_batch_size, num_steps, trainer.has_short_batches)
    steps = lay_out_steps(
        data.pairs,
        ids,
        config.layout,
        parallelism=trainer.per_device_parallelism,
        row_shards=placement.row_shards,
        shape_tokens=tokens_while_compiling(parameter_count(base.model)),
    )
    refuse_other_steps(steps)
    if config.initialize_from_peft is None and lora.a_init == "eva":
        size = trainer.train_batch_size
        policy = with_eva(policy, base.model, lora, steps, placement, batch_size=size, key=k_adapters)
        policy = placed_adapters(policy, placement, trainer.precision.param_dtype)
    learner = real_learner(
        config.objective,
        config.optimizer.build(num_steps),
        policy,
        placement,
        key=k_dropout,
        reference=frozen_copy(policy) if config.reference_has_adapters else None,
        reference_sync=config.reference_sync,
        schedule=config.optimizer.schedule(num_steps),
    )
    return Run(data, base, lora, order, steps, learner)


def _check_choice(config: TrainConfig, data: Data) -> None:
    """Raises ValueError unless evaluations log the metric of trainer.best."""
    best = config.trainer.best
    if not len(data.held_out):
        why = why_none_is_held_out(data.pairs, config.held_out_fraction)
        raise ValueError(f"trainer.best.metric={best.metric} is of held-out data, and there are none: {why}")
    refuse_unknown_metric(best, metric_names(config.objective, data.held_out))


def placement_of(config: TrainConfig) -> Placement:
    """The devices here. Raises ValueError if they do not fill `trainer.mesh`, or cannot compute `model.attention`."""
    placement = Placement(config.trainer.mesh)
    platform = placement.mesh.devices.flat[0].platform
    if (needed := PLATFORMS.get(config.model.attention, platform)) != platform:
        raise ValueError(
            f"model.attention={config.model.attention} needs a {needed}, and this is a {platform}: set auto"
        )
    return placement


def load_data(config: TrainConfig) -> Data:
    """Reads and tokenizes the rows. All processes must call this."""
    tokenizer = load_tokenizer(config)
    return Data(tokenizer, *load_tables(config, tokenizer))


def load_tables(config: TrainConfig, tokenizer: Any) -> tuple[ExampleTable, ExampleTable]:
    """(train, validation): the components' validation data if there is any, else a part of the training pairs.

    The first process of each host tokenizes, unless it finds the work of process 0. The other processes only read.
    Raises ValueError unless the tables have what the loss needs.
    """
    loss = config.preference_loss
    train, validation = in_turns(lambda: load_examples(config.data, tokenizer, train_seq_len=config.train_seq_len))
    if validation or not train:
        tables = whole_table(train), whole_table(validation)
    else:
        tables = split_by_prompt(train, config.held_out_fraction, config.trainer.seed)
    for table in tables:
        refuse_unfit_data(loss, table)
    if not loss.needs_mismatched:
        return tables
    pairing = {"seed": config.trainer.seed, "longest": config.train_seq_len}
    return with_mismatched_answers(tables[0], **pairing), with_mismatched_answers(tables[1], **pairing)


def reference_log_probs(
    config: TrainConfig, base: Base, reference: CausalLM, placement: Placement
) -> ReferenceLogProbs:
    """The log-probs of `reference`, the model that the policy is held to."""
    cache, setting = None, config.reference_log_probs
    if config.preference_loss.needs_tokens_of_reference:
        setting = "live"  # the cache holds sums over whole responses
    if config.reference_sync.moves:
        setting = "live"  # what is cached would not hold after the first sync
    if setting != "live":
        identity = reference_identity(config, base, reference) if is_first_process() else {}
        cache = ReferenceCache(cache_folder(config.data.cache_dir) / "reference", identity)
    return ReferenceLogProbs(reference, setting, cache, placement)


def pair_scorer(pairs: ExampleTable, *, trainer: TrainerConfig, placement: Placement) -> Scorer:
    """Scores a table on the devices, with as many rows at once as `trainer` allows."""
    rows = max(trainer.per_device_eval_parallelism, trainer.per_device_parallelism)
    if trainer.per_device_eval_parallelism != -1:
        rows = trainer.per_device_eval_parallelism
    rows = (rows if rows != -1 else 8) * placement.row_shards
    return Scorer(pairs, rows=rows, put_batch=placement.put_batch, scope=placement.scope)
