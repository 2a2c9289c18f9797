"""Direct Preference Optimization with LoRA adapters in JAX, Equinox and Haliax."""

import os

# Without PyTorch, transformers advises to install it when it is imported; its tokenizers, all that is used, need none.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from lora_dpo_jax.evaluation import PairScorer, summarize
from lora_dpo_jax.generation import GenerationConfig, complete, generate
from lora_dpo_jax.huggingface.adapters import load_adapter, save_adapter
from lora_dpo_jax.huggingface.weights import load_model, read_config, save_merged
from lora_dpo_jax.log_probs import pair_log_probs
from lora_dpo_jax.lora import LoraConfig, LoraLinear, frozen_copy, loraize, merge_lora, trainable_filter, unwrap_lora
from lora_dpo_jax.losses import Dpo, LengthNormalizedDpo, PairLogProbs, PreferenceLoss
from lora_dpo_jax.models import CausalLM, DecoderConfig
from lora_dpo_jax.reference_cache import ReferenceCache
from lora_dpo_jax.sharding import MeshConfig, Placement
from lora_dpo_jax.training.optimizer import OptimizerConfig
from lora_dpo_jax.training.step import TrainState, TrainStep

__version__ = "0.1.0"

__all__ = [
    "CausalLM",
    "DecoderConfig",
    "Dpo",
    "GenerationConfig",
    "LengthNormalizedDpo",
    "LoraConfig",
    "LoraLinear",
    "MeshConfig",
    "OptimizerConfig",
    "PairLogProbs",
    "PairScorer",
    "Placement",
    "PreferenceLoss",
    "ReferenceCache",
    "TrainState",
    "TrainStep",
    "complete",
    "frozen_copy",
    "generate",
    "load_adapter",
    "load_model",
    "loraize",
    "merge_lora",
    "pair_log_probs",
    "read_config",
    "save_adapter",
    "save_merged",
    "summarize",
    "trainable_filter",
    "unwrap_lora",
]
