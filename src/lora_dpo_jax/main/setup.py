"""The former place of what is in `runs` now, for scripts that import it from here."""

from lora_dpo_jax.runs.setup import TrainConfig, load_tables, load_tokenizer

__all__ = ["TrainConfig", "load_tables", "load_tokenizer"]
