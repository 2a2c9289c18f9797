"""Settings of the computation that change results only by rounding: gradient checkpointing and attention kernels."""

from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
from haliax.nn.scan import ScanCheckpointPolicy

from lora_dpo_jax.lora import LOW_RANK
from lora_dpo_jax.models.attention import IMPLEMENTATIONS
from lora_dpo_jax.models.attention.packed_blocks import ATTENDED
from lora_dpo_jax.models.linear import PRODUCT
from lora_dpo_jax.settings.choices import check_choice


class KeepActivations(ScanCheckpointPolicy):
    """Keeps everything that the backward pass needs, but no copy of the weights.

    haliax gives the scanned weights a checkpoint name, and saving this name would copy them.
    """

    def checkpoint(self, carry_name: str, input_name: str, callable: Callable) -> Callable:
        policy = jax.checkpoint_policies.save_anything_except_these_names(input_name)
        return eqx.filter_checkpoint(callable, policy=policy, prevent_cse=False)


# What is kept for the backward pass, and what it costs to recompute the rest.
CHECKPOINT_POLICIES: dict[str, ScanCheckpointPolicy] = {
    "none": KeepActivations(),  # keeps everything: most memory
    # Keeps the outputs of linear layers and of attention: norms, rotations and activations are computed again.
    "products": ScanCheckpointPolicy(save_block_internals=[PRODUCT, LOW_RANK, ATTENDED]),
    "full": ScanCheckpointPolicy(simple=True),  # keeps each layer's input: one more forward pass
    "nested": ScanCheckpointPolicy(nested=True),  # keeps about sqrt(layers) inputs: two more forward passes
}


@dataclass(frozen=True)
class ComputeConfig:
    """How a model is computed. Every architecture supports all of these settings."""

    gradient_checkpointing: str = "none"  # a key of CHECKPOINT_POLICIES
    attention: str = "auto"  # one of attention.IMPLEMENTATIONS

    def __post_init__(self):
        check_choice("model.gradient_checkpointing", self.gradient_checkpointing, CHECKPOINT_POLICIES)
        check_choice("model.attention", self.attention, IMPLEMENTATIONS)

    @property
    def checkpoint_policy(self) -> ScanCheckpointPolicy:
        return CHECKPOINT_POLICIES[self.gradient_checkpointing]


DEFAULT_COMPUTE = ComputeConfig()
