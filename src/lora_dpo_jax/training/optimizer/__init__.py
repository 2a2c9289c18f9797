"""Optimizers: from gradients of the adapters to updates of them."""

from lora_dpo_jax.training.optimizer.adafactor import Adafactor
from lora_dpo_jax.training.optimizer.adamw import AdamW
from lora_dpo_jax.training.optimizer.adamw_8bit import AdamW8bit
from lora_dpo_jax.training.optimizer.interface import Optimizer
from lora_dpo_jax.training.optimizer.lion import Lion
from lora_dpo_jax.training.optimizer.muon import Muon
from lora_dpo_jax.training.optimizer.schedule_free import ScheduleFree, adapters_to_evaluate

# The keys are the values of `optimizer.type`.
OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "adamw_8bit": AdamW8bit,
    "adafactor": Adafactor,
    "lion": Lion,
    "muon": Muon,
    "schedule_free": ScheduleFree,
}
for _name, _optimizer in OPTIMIZERS.items():
    Optimizer.register_subclass(_name, _optimizer)

OptimizerConfig = AdamW  # the name in scripts, from the time when there was no other

__all__ = [
    "OPTIMIZERS",
    "Adafactor",
    "AdamW",
    "AdamW8bit",
    "Lion",
    "Muon",
    "Optimizer",
    "OptimizerConfig",
    "ScheduleFree",
    "adapters_to_evaluate",
]
