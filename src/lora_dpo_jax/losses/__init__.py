"""Losses: from the scores of responses to a loss for each example. They do not depend on models or token ids."""

from lora_dpo_jax.losses.examples import Examples
from lora_dpo_jax.losses.interface import Loss
from lora_dpo_jax.losses.logistic import Dpo, LengthNormalizedDpo
from lora_dpo_jax.losses.preference import Compared, PreferenceLoss
from lora_dpo_jax.losses.scores import Scores, TokenScores

# The keys are the values of `loss.type`.
LOSSES: dict[str, type[Loss]] = {
    "sigmoid": Dpo,
    "sigmoid_norm": LengthNormalizedDpo,
}
for _name, _loss in LOSSES.items():
    Loss.register_subclass(_name, _loss)

__all__ = [
    "LOSSES",
    "Compared",
    "Dpo",
    "Examples",
    "LengthNormalizedDpo",
    "Loss",
    "PreferenceLoss",
    "Scores",
    "TokenScores",
]
