"""Products of rows, sorted by group, with the matrix of their group."""

from lora_dpo_jax.models.grouped_products.grouped_dot import grouped_dot

__all__ = ["grouped_dot"]
