"""How a model is computed, as far as that changes no number beyond rounding: what it keeps, and by which kernels."""

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
    """Keeps all that the backward pass needs, but no copy of the weights, which haliax's names would make of them."""

    def checkpoint(self, carry_name: str, input_name: str, callable: Callable) -> Callable:
        policy = jax.checkpoint_policies.save_anything_except_these_names(input_name)
        return eqx.filter_checkpoint(callable, policy=policy, prevent_cse=False)


# What the backward pass finds in memory, and what it costs to find the rest.
CHECKPOINT_POLICIES: dict[str, ScanCheckpointPolicy] = {
    "none": KeepActivations(),  # keeps everything: most memory
    # Keeps the outputs of linear layers and of attention: norms, rotations and activations are computed again.
    "products": ScanCheckpointPolicy(save_block_internals=[PRODUCT, LOW_RANK, ATTENDED]),
    "full": ScanCheckpointPolicy(simple=True),  # keeps each layer's input: one more forward pass
    "nested": ScanCheckpointPolicy(nested=True),  # keeps about sqrt(layers) inputs: two more forward passes
}


@dataclass(frozen=True)
class ComputeConfig:
    """A model of any architecture takes any of these."""

    gradient_checkpointing: str = "none"  # a key of CHECKPOINT_POLICIES
    attention: str = "auto"  # one of attention.IMPLEMENTATIONS

    def __post_init__(self):
        check_choice("model.gradient_checkpointing", self.gradient_checkpointing, CHECKPOINT_POLICIES)
        check_choice("model.attention", self.attention, IMPLEMENTATIONS)

    @property
    def checkpoint_policy(self) -> ScanCheckpointPolicy:
        return CHECKPOINT_POLICIES[self.gradient_checkpointing]


DEFAULT_COMPUTE = ComputeConfig()
