"""The settings of a run, and all checks of settings that need neither data nor weights nor devices."""

import dataclasses
import itertools
import logging
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import draccus

from lora_dpo_jax.data.config import PreferenceDataConfig
from lora_dpo_jax.data.shapes import PackingConfig
from lora_dpo_jax.generation import GenerationConfig
from lora_dpo_jax.huggingface.hub import HubConfig
from lora_dpo_jax.lora import LoraConfig
from lora_dpo_jax.losses import Dpo, Loss
from lora_dpo_jax.models import ComputeConfig
from lora_dpo_jax.models.quantization import QUANTIZATIONS
from lora_dpo_jax.places import refuse_impossible_paths, same_place
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.redaction import redacted
from lora_dpo_jax.settings.choices import check_choice, check_choices
from lora_dpo_jax.settings.decoding import config_of
from lora_dpo_jax.training.loop import TrainerConfig
from lora_dpo_jax.training.optimizer import OptimizerConfig
from lora_dpo_jax.training.precision import precision_of
from lora_dpo_jax.training.reference_sync import ReferenceSync

logger = logging.getLogger("lora_dpo_jax")


@dataclass(frozen=True)
class ModelConfig:
    """How the pretrained model is held and computed."""

    dtype: str | None = None  # of the frozen weights (f32, bf16); null: the computation's dtype, see trainer.mp
    gradient_checkpointing: str = "full"  # none, products, full or nested: see models/compute.py for what each costs
    attention: str = "auto"  # auto, blocked, pallas_tpu, pallas_gpu or dense: see models/attention
    quantization: str = "none"  # of the frozen matrices of the layers: nf4, int8 or none
    router_aux_loss_coef: float = 0.0  # of models with experts: the weight of the loss for uneven routing; 0: none

    def __post_init__(self):
        _ = self.compute  # checks its settings
        check_choice("model.quantization", self.quantization, QUANTIZATIONS)
        if "=" in (self.dtype or ""):
            raise ValueError(f"model.dtype={self.dtype!r} must be one dtype; for example f32 or bf16")
        self.weights_dtype(None)  # raises if it cannot be parsed
        if not 0.0 <= self.router_aux_loss_coef < math.inf:
            raise ValueError(f"model.router_aux_loss_coef={self.router_aux_loss_coef} must be 0 or a positive number")

    @property
    def compute(self) -> ComputeConfig:
        return ComputeConfig(self.gradient_checkpointing, self.attention)

    def weights_dtype(self, compute_dtype: Any) -> Any:
        """The dtype of the frozen weights in a run that computes in `compute_dtype`."""
        return compute_dtype if self.dtype is None else precision_of("model.dtype", self.dtype).param_dtype


@dataclass(frozen=True)
class TrainConfig:
    """A LoRA-DPO run. Names are those of Levanter's `lora_dpo` where it has one."""

    data: PreferenceDataConfig
    initialize_from_hf: str  # the base model: a folder, a URL or a hub id
    hf_revision: str | None = None  # branch, tag or commit of that hub id
    train_seq_len: int = 1024  # tokens; the limit of prompt + one response
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: PackingConfig = field(default_factory=PackingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: Loss = field(default_factory=Dpo)
    beta: float | None = None  # short for loss.beta
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    # Modules (my_package.losses) on sys.path or in the current folder. They are imported before all other settings are
    # read, and may register types of loss and tracker.
    plugins: list[str] = field(default_factory=list, metadata={"names_modules": True})

    # Continue to train this adapter instead of a new one; `lora` then follows its adapter_config.json, except dropout.
    initialize_from_peft: str | None = None
    # The reference in that case: the adapter as it was given, as in TRL, or the bare base.
    peft_reference: Literal["adapter", "base"] = "adapter"

    reference_sync: ReferenceSync = field(default_factory=ReferenceSync)  # a reference that follows the policy (TR-DPO)

    # live: in each step. cached: on disk, each pair computed once for all runs. auto: the one with less computation.
    reference_log_probs: Literal["auto", "live", "cached"] = "auto"

    # Share of the training pairs that is held out, by prompt, unless a component has validation data; null or 0: none.
    validation_split_fraction: float | None = 0.1

    peft_save_path: str | None = None  # a folder or a URL; the final adapter
    # as_is: the adapter with the settings of lora. plain: the same adapter with one rank, and alpha / r as its scaling,
    # for servers that do not read use_rslora or the patterns.
    peft_scaling: Literal["as_is", "plain"] = "as_is"
    merged_hf_save_path: str | None = None  # a folder or a URL; the final merged model
    # A folder or a URL; the final adapter as adapter.gguf, for llama.cpp. Needs the extra `gguf`.
    gguf_save_path: str | None = None
    hf_save_steps: int | None = None  # also export to <path>/step-<n> after every so many steps
    hub: HubConfig = field(default_factory=HubConfig)  # where finished exports are pushed
    overwrite: bool = False  # replace another run's exports at these paths; never any other files

    preview: int = 0  # print this many tokenized pairs, coloured by role, and stop
    sample_prompts: list[str] = field(default_factory=list)  # completed before and after training
    generation: GenerationConfig = field(default_factory=lambda: GenerationConfig(max_new_tokens=64))

    # Two names of one setting: one on the command line replaces the other in the file.
    either: ClassVar = (("beta", "loss.beta"), ("trainer.num_train_steps", "trainer.num_train_epochs"))
    # The advice if one of these is missing.
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
        if self.hf_save_steps is not None and not self.export_paths:
            raise ValueError(
                f"hf_save_steps={self.hf_save_steps} exports nothing: set peft_save_path, merged_hf_save_path or "
                "gguf_save_path"
            )
        self.hub.check_exports(self.export_paths)
        if self.preview < 0:
            raise ValueError(f"preview={self.preview} must be a number of pairs, or 0 to train")
        check_choices(self)
        if self.reference_log_probs == "cached" and self.loss.needs_tokens_of_reference:
            raise ValueError(
                f"reference_log_probs=cached keeps sums over whole responses, and loss.type="
                f"{self.loss.get_choice_name(type(self.loss))} needs those of each token. Set it to auto or live"
            )
        if self.reference_sync.moves:
            self._check_sync()
        if self.beta is not None:
            if not 0 < self.beta < math.inf:
                raise ValueError(f"beta={self.beta} must be positive and finite")
            if self.loss.beta not in (self.beta, type(self.loss).beta):
                raise ValueError(f"beta={self.beta} and loss.beta={self.loss.beta} disagree; give one of them")
        self._check_paths()

    @property
    def held_out_fraction(self) -> float:
        return self.validation_split_fraction or 0.0

    @property
    def export_paths(self) -> dict[str, str]:
        """The path of each export that is set, by the name of its setting."""
        names = ("peft_save_path", "merged_hf_save_path", "gguf_save_path")
        return {name: path for name in names if (path := getattr(self, name)) is not None}

    @property
    def preference_loss(self) -> Loss:
        return self.loss if self.beta is None else dataclasses.replace(self.loss, beta=self.beta)

    @property
    def objective(self) -> PreferenceObjective:
        return PreferenceObjective(
            self.preference_loss, self.trainer.token_metrics, router_aux_loss_coef=self.model.router_aux_loss_coef
        )

    @property
    def reference_adapter(self) -> str | None:
        """The adapter of the reference; None if the reference is the bare base."""
        return self.initialize_from_peft if self.peft_reference == "adapter" else None

    @property
    def reference_has_adapters(self) -> bool:
        return self.reference_adapter is not None or self.reference_sync.moves

    @property
    def starts_equal(self) -> bool:
        """Whether policy and reference compute the same in step 0."""
        if self.initialize_from_peft is None:
            return True
        # Dropout moves the policy away from an adapter that is not zero.
        return self.reference_adapter is not None and self.lora.dropout == 0.0

    def _check_sync(self) -> None:
        if not self.preference_loss.needs_reference:
            raise ValueError(
                f"reference_sync moves the reference, and loss.type={self.loss.get_choice_name(type(self.loss))} has "
                "none. Leave reference_sync out, or choose another loss"
            )
        if self.reference_log_probs == "cached":
            raise ValueError(
                "reference_log_probs=cached is for a reference that never changes, and reference_sync moves it. Set it "
                "to auto or live"
            )
        if self.initialize_from_peft is not None and self.peft_reference == "base":
            raise ValueError(
                "reference_sync mixes the adapters of policy and reference, and with peft_reference=base the reference "
                "has none. Set peft_reference=adapter"
            )

    def _check_paths(self) -> None:
        refuse_impossible_paths(
            {
                "initialize_from_hf": self.initialize_from_hf,
                "initialize_from_peft": self.initialize_from_peft,
                "peft_save_path": self.peft_save_path,
                "merged_hf_save_path": self.merged_hf_save_path,
                "gguf_save_path": self.gguf_save_path,
                "data.tokenizer": self.data.tokenizer,
                "data.cache_dir": self.data.cache_dir,
                "trainer.log_dir": self.trainer.log_dir,
                "trainer.checkpointer.base_path": self.trainer.checkpointer.base_path,
                "trainer.jax_compilation_cache_dir": self.trainer.jax_compilation_cache_dir,
            }
        )
        for (one, path), (other, same) in itertools.combinations(self.export_paths.items(), 2):
            if path and same and same_place(path, same):
                raise ValueError(f"{one} and {other} are both {path}; they must differ")


# Decoding plain values by draccus then makes the same checks as the commands.
draccus.decode.register(TrainConfig, lambda cls, tree, path: config_of(cls, tree), include_subclasses=True)


def with_zero_init(config: TrainConfig) -> TrainConfig:
    """The config with `lora.zero_init_b` set, with a warning if it was not."""
    if config.lora.zero_init_b:
        return config
    logger.warning("lora.zero_init_b=false would start away from the reference; it is set to true")
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, zero_init_b=True))


def resolved_settings(config: TrainConfig, run_id: str) -> Any:
    """The settings, without secrets, that repeat this run: with one beta, and the id that resumes it."""
    trainer = dataclasses.replace(config.trainer, id=run_id)
    encode: Any = draccus.encode
    tree = encode(dataclasses.replace(config, loss=config.preference_loss, beta=None, trainer=trainer))
    del tree["beta"]
    return redacted(tree)
