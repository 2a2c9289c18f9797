"""Names that are in `runs` now, for scripts that import them from here."""

from lora_dpo_jax.runs.assembly import load_tables
from lora_dpo_jax.runs.base import load_tokenizer
from lora_dpo_jax.runs.config import TrainConfig

__all__ = ["TrainConfig", "load_tables", "load_tokenizer"]
