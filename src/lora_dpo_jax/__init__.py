"""Direct Preference Optimization with LoRA adapters in JAX, Equinox and Haliax."""

import os
from typing import TYPE_CHECKING

from lora_dpo_jax.lazy import lazily

# Without PyTorch, transformers advises to install it when it is imported; its tokenizers, all that is used, need none.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if TYPE_CHECKING:
    from lora_dpo_jax.evaluation import Scorer, summarize
    from lora_dpo_jax.generation import GenerationConfig, complete, generate
    from lora_dpo_jax.huggingface.adapters import load_adapter, save_adapter
    from lora_dpo_jax.huggingface.weights import load_model, read_config, save_merged
    from lora_dpo_jax.log_probs import score_responses
    from lora_dpo_jax.lora import (
        LoraConfig,
        LoraLinear,
        frozen_copy,
        loraize,
        merge_lora,
        trainable_filter,
        unwrap_lora,
    )
    from lora_dpo_jax.losses import Compared, Dpo, LengthNormalizedDpo, Loss, PreferenceLoss, Scores
    from lora_dpo_jax.models import CausalLM, DecoderConfig
    from lora_dpo_jax.objective import ExampleLosses
    from lora_dpo_jax.preference_objective import PreferenceObjective
    from lora_dpo_jax.reference_cache import ReferenceCache
    from lora_dpo_jax.sharding import MeshConfig, Placement
    from lora_dpo_jax.training.optimizer import OptimizerConfig
    from lora_dpo_jax.training.step import TrainState, TrainStep

__getattr__ = lazily(
    __name__,
    {
        "evaluation": "Scorer summarize",
        "generation": "GenerationConfig complete generate",
        "huggingface.adapters": "load_adapter save_adapter",
        "huggingface.weights": "load_model read_config save_merged",
        "log_probs": "score_responses",
        "lora": "LoraConfig LoraLinear frozen_copy loraize merge_lora trainable_filter unwrap_lora",
        "losses": "Compared Dpo LengthNormalizedDpo Loss PreferenceLoss Scores",
        "models": "CausalLM DecoderConfig",
        "objective": "ExampleLosses",
        "preference_objective": "PreferenceObjective",
        "reference_cache": "ReferenceCache",
        "sharding": "MeshConfig Placement",
        "training.optimizer": "OptimizerConfig",
        "training.step": "TrainState TrainStep",
    },
)

__version__ = "0.1.0"

__all__ = [
    "CausalLM",
    "Compared",
    "DecoderConfig",
    "Dpo",
    "ExampleLosses",
    "GenerationConfig",
    "LengthNormalizedDpo",
    "LoraConfig",
    "LoraLinear",
    "Loss",
    "MeshConfig",
    "OptimizerConfig",
    "Placement",
    "PreferenceLoss",
    "PreferenceObjective",
    "ReferenceCache",
    "Scorer",
    "Scores",
    "TrainState",
    "TrainStep",
    "complete",
    "frozen_copy",
    "generate",
    "load_adapter",
    "load_model",
    "loraize",
    "merge_lora",
    "read_config",
    "save_adapter",
    "save_merged",
    "score_responses",
    "summarize",
    "trainable_filter",
    "unwrap_lora",
]
