"""What training and evaluation both begin with: the settings of a run, its model, its pairs, its held-out scores."""

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import draccus
import jax
import jmp
import numpy as np
from transformers import AutoTokenizer

from lora_dpo_jax.data.cache import TokenizedPairs, load_pairs
from lora_dpo_jax.data.loader import PairTable, split_by_prompt, whole_table
from lora_dpo_jax.data.planning import PairLayout, RunLayout, plan_layout
from lora_dpo_jax.data.preferences import PreferenceDataConfig, default_cache_dir
from lora_dpo_jax.evaluation import PairScorer
from lora_dpo_jax.generation import GenerationConfig
from lora_dpo_jax.huggingface.adapters import load_adapter
from lora_dpo_jax.huggingface.folders import local_folder
from lora_dpo_jax.huggingface.weights import load_model, read_config
from lora_dpo_jax.lora import LoraConfig
from lora_dpo_jax.losses import Dpo, PreferenceLoss
from lora_dpo_jax.models import CausalLM, ComputeConfig, DecoderConfig
from lora_dpo_jax.models.attention import PLATFORMS
from lora_dpo_jax.models.quantization import QUANTIZATIONS
from lora_dpo_jax.redaction import RedactingFormatter
from lora_dpo_jax.sharding import Placement
from lora_dpo_jax.training.distributed import in_turns
from lora_dpo_jax.training.optimizer import OptimizerConfig
from lora_dpo_jax.training.trainer import TrainerConfig

logger = logging.getLogger("lora_dpo_jax")

TOKENS_AT_ONCE = 16_384  # of a device, where per_device_parallelism leaves it open: more make no device faster
TOKENIZER_FILES = ["*token*", "*.jinja", "*.model", "vocab*", "merges*", "config.json"]


@dataclass(frozen=True)
class ModelConfig:
    """How the pretrained model is held and computed."""

    dtype: str | None = None  # of the frozen weights (f32, bf16); null: that of computation, see trainer.mp
    gradient_checkpointing: str = "full"  # none, products, full or nested: see models/compute.py for what each costs
    attention: str = "auto"  # auto, blocked, pallas_tpu, pallas_gpu or dense: see models/attention
    quantization: str = "none"  # of the frozen matrices of the layers: nf4, int8 or none

    def __post_init__(self):
        _ = self.compute  # which checks what it is made of
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"model.quantization={self.quantization!r} must be one of {[*QUANTIZATIONS]}")
        if self.dtype is not None:
            _parse_dtype(self.dtype)

    @property
    def compute(self) -> ComputeConfig:
        return ComputeConfig(self.gradient_checkpointing, self.attention)


@dataclass(frozen=True)
class TrainConfig:
    """A LoRA-DPO run. Names are those of Levanter's `lora_dpo` where it has one."""

    data: PreferenceDataConfig
    initialize_from_hf: str  # the base model: a folder, a URL or a hub id
    hf_revision: str | None = None
    train_seq_len: int = 1024  # tokens; bounds prompt + one response
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: PairLayout = field(default_factory=PairLayout)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: PreferenceLoss = field(default_factory=Dpo)
    beta: float | None = None  # the short form of loss.beta
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    # Go on training this adapter instead of a new one; `lora` then follows its adapter_config.json, but for dropout.
    initialize_from_peft: str | None = None
    # What the policy is held to in that case: the adapter as it was given, as in TRL, or the bare base.
    peft_reference: Literal["adapter", "base"] = "adapter"

    # live: in each step. cached: on disk, each pair computed once for all runs. auto: by which the run computes less.
    reference_log_probs: Literal["auto", "live", "cached"] = "auto"

    validation_split_fraction: float = 0.1  # held out by prompt, unless a component has validation files of its own

    peft_save_path: str | None = None  # a folder or a URL; the final adapter
    merged_hf_save_path: str | None = None  # likewise; the final merged model
    hf_save_steps: int | None = None  # also export to <path>/step-<n> every so many steps

    preview: int = 0  # print so many tokenized pairs, coloured by role, and stop
    sample_prompts: list[str] = field(default_factory=list)  # completed before and after training
    generation: GenerationConfig = field(default_factory=lambda: GenerationConfig(max_new_tokens=64))

    def __post_init__(self):
        if not 0.0 <= self.validation_split_fraction < 1.0:
            raise ValueError(f"validation_split_fraction={self.validation_split_fraction} must be in [0, 1)")
        if self.train_seq_len < 2:
            raise ValueError(f"train_seq_len={self.train_seq_len} must be at least 2 tokens")
        if self.hf_save_steps is not None and self.hf_save_steps < 1:
            raise ValueError(f"hf_save_steps={self.hf_save_steps} must be positive")
        if self.peft_reference not in ("adapter", "base"):
            raise ValueError(f"peft_reference={self.peft_reference!r} must be adapter or base")
        if self.reference_log_probs not in ("auto", "live", "cached"):
            raise ValueError(f"reference_log_probs={self.reference_log_probs!r} must be auto, live or cached")
        if self.peft_save_path is not None and self.peft_save_path == self.merged_hf_save_path:
            raise ValueError(f"peft_save_path and merged_hf_save_path are both {self.peft_save_path}; they must differ")
        if self.beta is not None and self.loss.beta not in (self.beta, type(self.loss)().beta):
            raise ValueError(f"beta={self.beta} and loss.beta={self.loss.beta} disagree; give one of them")

    @property
    def preference_loss(self) -> PreferenceLoss:
        return self.loss if self.beta is None else dataclasses.replace(self.loss, beta=self.beta)

    @property
    def reference_adapter(self) -> str | None:
        """The adapter that the policy is held to; None if it is held to the bare base."""
        return self.initialize_from_peft if self.peft_reference == "adapter" else None


def parse_arguments(config_class: type) -> Any:
    """The configuration from `--config_path` and the command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("jax", "httpx", "datasets", "fsspec", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return draccus.parse(config_class=config_class)


def process_start() -> float:
    """When this process began, of time.perf_counter: where the system tells, before Python and the imports."""
    now = time.perf_counter()
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # seconds after the system
        return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, ValueError):  # not Linux
        return now


def keep_programs(config: TrainConfig) -> None:
    """Tells JAX where to look for compiled programs and to leave new ones."""
    chosen = config.trainer.jax_compilation_cache_dir
    if chosen is None and not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        chosen = str(Path(config.data.cache_dir or default_cache_dir()).expanduser() / "programs")
    if chosen is not None:
        jax.config.update("jax_compilation_cache_dir", chosen)


@dataclass(frozen=True)
class Base:
    """The pretrained model and what came with it."""

    folder: Path
    config: DecoderConfig
    model: CausalLM
    tokenizer: Any


def load_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer of `data.tokenizer`, or the base model's."""
    if config.data.tokenizer:
        folder = folder_of("data.tokenizer", config.data.tokenizer, patterns=TOKENIZER_FILES)
    else:
        name, revision = config.initialize_from_hf, config.hf_revision
        folder = folder_of("initialize_from_hf", name, revision=revision, patterns=TOKENIZER_FILES)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no tokenizer that loads; set data.tokenizer. {error}") from error


def load_base(config: TrainConfig, tokenizer: Any, placement: Placement) -> Base:
    """Reads the weights of `initialize_from_hf` to their devices, in the dtype that `config.model` asks for."""
    folder = folder_of("initialize_from_hf", config.initialize_from_hf, revision=config.hf_revision)
    decoder = read_config(folder)
    _check_lengths(config, decoder)
    platform = placement.mesh.devices.flat[0].platform
    if (needed := PLATFORMS.get(config.model.attention, platform)) != platform:
        raise ValueError(
            f"model.attention={config.model.attention} needs a {needed}, and this is a {platform}: set auto"
        )
    if len(tokenizer) > decoder.vocab_size:
        raise ValueError(
            f"the tokenizer knows {len(tokenizer)} tokens, but {config.initialize_from_hf} embeds only "
            f"{decoder.vocab_size}: set data.tokenizer to the model's own"
        )
    dtype = config.trainer.precision.compute_dtype
    if config.model.dtype is not None:
        dtype = _parse_dtype(config.model.dtype)
    with placement.scope():
        model = load_model(
            folder,
            decoder,
            dtype=dtype,
            compute=config.model.compute,
            mapping=placement.parameters,
            quantization=config.model.quantization,
        )
    return Base(folder, decoder, model, tokenizer)


def load_tables(config: TrainConfig, tokenizer: Any) -> tuple[PairTable, PairTable]:
    """(train, validation): validation files where a component has some, else a part of the training pairs.

    The first process of each host tokenizes, unless it finds what the very first one has; the others only read.
    """

    def load(split) -> dict[str, TokenizedPairs]:
        return load_pairs(config.data, tokenizer, split=split, train_seq_len=config.train_seq_len)

    train, validation = in_turns(lambda: (load("train"), load("validation")))
    if validation or not train:
        return whole_table(train), whole_table(validation)
    return split_by_prompt(train, config.validation_split_fraction, config.trainer.seed)


def scorer(config: TrainConfig, pairs: PairTable, placement: Placement) -> PairScorer:
    trainer = config.trainer
    rows = max(trainer.per_device_eval_parallelism, trainer.per_device_parallelism)
    if trainer.per_device_eval_parallelism != -1:
        rows = trainer.per_device_eval_parallelism
    rows = (rows if rows != -1 else 8) * placement.row_shards
    return PairScorer(pairs, rows=rows, put_batch=placement.put_batch, scope=placement.scope)


def layout_of_run(
    pairs: PairTable, batch_ids: Sequence[np.ndarray], parallelism: int, layout: PairLayout, *, row_shards: int
) -> RunLayout:
    """How the pairs of each step are laid into rows; `parallelism` is trainer.per_device_parallelism."""
    bound = row_bound(parallelism, layout.shortest_row(pairs.lengths))
    return plan_layout(batch_ids, pairs.lengths, row_multiple=row_shards, longest_row=bound, pair_layout=layout)


def row_bound(parallelism: int, longest_pair: int) -> int:
    """Tokens that a device computes at once."""
    return max(longest_pair, TOKENS_AT_ONCE) if parallelism == -1 else parallelism * longest_pair


def load_peft_adapter(model: CausalLM, folder: Path, placement: Placement) -> CausalLM:
    with placement.scope():
        return load_adapter(model, folder, mapping=placement.parameters)


def folder_of(setting: str, name: str, **options: Any) -> Path:
    """`local_folder`, whose error then names the setting too."""
    try:
        return local_folder(name, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{setting}: {error}") from error


def _check_lengths(config: TrainConfig, decoder: DecoderConfig) -> None:
    limit = decoder.max_position_embeddings
    if config.train_seq_len <= limit:
        return
    if decoder.rope.type == "dynamic":
        raise ValueError(
            f"train_seq_len={config.train_seq_len} is beyond max_position_embeddings={limit}, where dynamic rotary "
            "scaling depends on each sequence's length, so that two responses cannot share their prompt. "
            f"Set train_seq_len to at most {limit}."
        )
    logger.warning("train_seq_len=%d is beyond the model's max_position_embeddings=%d", config.train_seq_len, limit)


def _parse_dtype(name: str) -> Any:
    try:
        return jmp.get_policy(name).param_dtype
    except Exception as error:
        raise ValueError(f"model.dtype={name!r} is no dtype; for example f32 or bf16") from error
