"""What training and evaluation both begin with: the settings of a run, its model, its pairs, its held-out scores."""

import dataclasses
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import draccus
import jax
import numpy as np

from lora_dpo_jax.data.batches import PairTable, split_by_prompt, whole_table
from lora_dpo_jax.data.cache import TokenizedPairs, load_pairs
from lora_dpo_jax.data.config import PreferenceDataConfig, default_cache_dir
from lora_dpo_jax.data.shapes import PairLayout, RunLayout, plan_layout
from lora_dpo_jax.evaluation import PairScorer
from lora_dpo_jax.generation import GenerationConfig, read_stop_ids
from lora_dpo_jax.huggingface.adapters import load_adapter, read_adapter_config
from lora_dpo_jax.huggingface.folders import local_folder
from lora_dpo_jax.huggingface.tokenizers import read_tokenizer
from lora_dpo_jax.huggingface.weights import load_model, read_config
from lora_dpo_jax.lora import LoraConfig
from lora_dpo_jax.losses import Dpo, PreferenceLoss
from lora_dpo_jax.models import CausalLM, ComputeConfig, DecoderConfig
from lora_dpo_jax.models.attention import PLATFORMS
from lora_dpo_jax.models.quantization import QUANTIZATIONS
from lora_dpo_jax.places import refuse_impossible_paths, same_place
from lora_dpo_jax.processes.exchange import in_turns
from lora_dpo_jax.processes.run_lock import process_started
from lora_dpo_jax.settings.decoding import config_of
from lora_dpo_jax.sharding import Placement
from lora_dpo_jax.training.loop import TrainerConfig
from lora_dpo_jax.training.optimizer import OptimizerConfig
from lora_dpo_jax.training.precision import precision_of

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
            _dtype_of(self.dtype)

    @property
    def compute(self) -> ComputeConfig:
        return ComputeConfig(self.gradient_checkpointing, self.attention)


@dataclass(frozen=True)
class TrainConfig:
    """A LoRA-DPO run. Names are those of Levanter's `lora_dpo` where it has one."""

    data: PreferenceDataConfig
    initialize_from_hf: str  # the base model: a folder, a URL or a hub id
    hf_revision: str | None = None  # branch, tag or commit of that hub id
    train_seq_len: int = 1024  # tokens; bounds prompt + one response
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: PairLayout = field(default_factory=PairLayout)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: PreferenceLoss = field(default_factory=Dpo)
    beta: float | None = None  # short for loss.beta
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    # Go on training this adapter instead of a new one; `lora` then follows its adapter_config.json, but for dropout.
    initialize_from_peft: str | None = None
    # What the policy is held to in that case: the adapter as it was given, as in TRL, or the bare base.
    peft_reference: Literal["adapter", "base"] = "adapter"

    # live: in each step. cached: on disk, each pair computed once for all runs. auto: by which the run computes less.
    reference_log_probs: Literal["auto", "live", "cached"] = "auto"

    # Share of the training pairs that is held out, by prompt, unless a component has validation data; null or 0: none.
    validation_split_fraction: float | None = 0.1

    peft_save_path: str | None = None  # a folder or a URL; the final adapter
    merged_hf_save_path: str | None = None  # likewise; the final merged model
    hf_save_steps: int | None = None  # also export to <path>/step-<n> every so many steps
    overwrite: bool = False  # another run's exports at these paths are replaced; no other files ever are

    preview: int = 0  # print so many tokenized pairs, coloured by role, and stop
    sample_prompts: list[str] = field(default_factory=list)  # completed before and after training
    generation: GenerationConfig = field(default_factory=lambda: GenerationConfig(max_new_tokens=64))

    # Two ways to say one thing: what the command line says in one takes the place of what the file says in the other.
    either: ClassVar = (("beta", "loss.beta"), ("trainer.num_train_steps", "trainer.num_train_epochs"))
    # What to say where one of these is missing.
    if_missing: ClassVar = dict.fromkeys(
        ("data", "initialize_from_hf"),
        "Give settings in a file, with --config_path FILE.yaml, or on the command line. The README's quickstart has a "
        "file that runs as it is: --config_path config/quickstart.yaml",
    )

    def __post_init__(self):
        if not 0.0 <= self.held_out_fraction < 1.0:
            raise ValueError(f"validation_split_fraction={self.validation_split_fraction} must be in [0, 1), or null")
        if self.train_seq_len < 2:
            raise ValueError(f"train_seq_len={self.train_seq_len} must be at least 2 tokens")
        if self.hf_save_steps is not None and self.hf_save_steps < 1:
            raise ValueError(f"hf_save_steps={self.hf_save_steps} must be positive")
        if self.hf_save_steps is not None and not (self.peft_save_path or self.merged_hf_save_path):
            raise ValueError(
                f"hf_save_steps={self.hf_save_steps} exports nothing: set peft_save_path, merged_hf_save_path or both"
            )
        if self.preview < 0:
            raise ValueError(f"preview={self.preview} must be a number of pairs, or 0 to train")
        refuse_impossible_paths(
            {
                "initialize_from_hf": self.initialize_from_hf,
                "initialize_from_peft": self.initialize_from_peft,
                "peft_save_path": self.peft_save_path,
                "merged_hf_save_path": self.merged_hf_save_path,
                "data.tokenizer": self.data.tokenizer,
                "data.cache_dir": self.data.cache_dir,
                "trainer.log_dir": self.trainer.log_dir,
                "trainer.checkpointer.base_path": self.trainer.checkpointer.base_path,
                "trainer.jax_compilation_cache_dir": self.trainer.jax_compilation_cache_dir,
            }
        )
        if self.peft_reference not in ("adapter", "base"):
            raise ValueError(f"peft_reference={self.peft_reference!r} must be adapter or base")
        if self.reference_log_probs not in ("auto", "live", "cached"):
            raise ValueError(f"reference_log_probs={self.reference_log_probs!r} must be auto, live or cached")
        if (
            self.peft_save_path
            and self.merged_hf_save_path
            and same_place(self.peft_save_path, self.merged_hf_save_path)
        ):
            raise ValueError(f"peft_save_path and merged_hf_save_path are both {self.peft_save_path}; they must differ")
        if self.beta is not None:
            if not 0 < self.beta < math.inf:
                raise ValueError(f"beta={self.beta} must be positive and finite")
            if self.loss.beta not in (self.beta, type(self.loss).beta):
                raise ValueError(f"beta={self.beta} and loss.beta={self.loss.beta} disagree; give one of them")

    @property
    def held_out_fraction(self) -> float:
        return self.validation_split_fraction or 0.0

    @property
    def preference_loss(self) -> PreferenceLoss:
        return self.loss if self.beta is None else dataclasses.replace(self.loss, beta=self.beta)

    @property
    def reference_adapter(self) -> str | None:
        """The adapter that the policy is held to; None if it is held to the bare base."""
        return self.initialize_from_peft if self.peft_reference == "adapter" else None


# Who decodes plain values by draccus gets the checks of the commands.
draccus.decode.register(TrainConfig, lambda cls, tree, path: config_of(cls, tree), include_subclasses=True)


def process_start() -> float:
    """When this process began, of time.perf_counter: where the system tells, before Python and the imports."""
    now, ticks = time.perf_counter(), process_started(os.getpid())
    if ticks is None:  # not Linux
        return now
    return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


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


def check_models(config: TrainConfig) -> None:
    """Reads the settings of the base and of the adapter that a run begins with, before its data: errors come early."""
    settings = ["*config.json"]
    name, revision = config.initialize_from_hf, config.hf_revision
    folder = folder_of("initialize_from_hf", name, revision=revision, patterns=settings)
    read_config(folder)
    read_stop_ids(folder)
    if config.initialize_from_peft is not None:
        read_adapter_config(folder_of("initialize_from_peft", config.initialize_from_peft, patterns=settings))


def placement_of(config: TrainConfig) -> Placement:
    """The devices here. Raises ValueError if they do not fill `trainer.mesh`, or cannot compute `model.attention`."""
    placement = Placement(config.trainer.mesh)
    platform = placement.mesh.devices.flat[0].platform
    if (needed := PLATFORMS.get(config.model.attention, platform)) != platform:
        raise ValueError(
            f"model.attention={config.model.attention} needs a {needed}, and this is a {platform}: set auto"
        )
    return placement


def load_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer of `data.tokenizer`, or the base model's."""
    if config.data.tokenizer:
        folder = folder_of("data.tokenizer", config.data.tokenizer, patterns=TOKENIZER_FILES)
    else:
        name, revision = config.initialize_from_hf, config.hf_revision
        folder = folder_of("initialize_from_hf", name, revision=revision, patterns=TOKENIZER_FILES)
    try:
        return read_tokenizer(folder)
    except ValueError as error:
        raise ValueError(f"{error}. Mend it, or set data.tokenizer") from error


def load_base(config: TrainConfig, tokenizer: Any, placement: Placement) -> Base:
    """Reads the weights of `initialize_from_hf` to their devices, in the dtype that `config.model` asks for."""
    folder = folder_of("initialize_from_hf", config.initialize_from_hf, revision=config.hf_revision)
    decoder = read_config(folder)
    _check_lengths(config, decoder)
    if len(tokenizer) > decoder.vocab_size:
        raise ValueError(
            f"the tokenizer knows {len(tokenizer)} tokens, but {config.initialize_from_hf} embeds only "
            f"{decoder.vocab_size}: set data.tokenizer to the model's own"
        )
    dtype = config.trainer.precision.compute_dtype
    if config.model.dtype is not None:
        dtype = _dtype_of(config.model.dtype)
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
    return split_by_prompt(train, config.held_out_fraction, config.trainer.seed)


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


def load_peft_adapter(
    model: CausalLM, folder: Path, placement: Placement, *, base_model: str | None = None
) -> CausalLM:
    """`base_model` is what the model is called in messages."""
    with placement.scope():
        return load_adapter(model, folder, mapping=placement.parameters, base_model=base_model)


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


def _dtype_of(name: str) -> Any:
    if "=" in name:
        raise ValueError(f"model.dtype={name!r} must be one dtype; for example f32 or bf16")
    return precision_of("model.dtype", name).param_dtype
