"""Products of rows, sorted by group, with the matrix of their group."""

from lora_dpo_jax.models.grouped_products.grouped_dot import grouped_dot, reads_stacks

__all__ = ["grouped_dot", "reads_stacks"]
