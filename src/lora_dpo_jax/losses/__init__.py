"""Losses: from the scores of responses to a loss for each example. They do not depend on models or token ids."""

from lora_dpo_jax.losses.each_response import ApoDown, ApoZero, Bco, Nca
from lora_dpo_jax.losses.examples import Examples
from lora_dpo_jax.losses.fixed_margin import Hinge, Ipo, Sppo
from lora_dpo_jax.losses.interface import Loss
from lora_dpo_jax.losses.likelihood import AlphaPo, Cpo, Orpo, Sft, SimPo
from lora_dpo_jax.losses.logistic import DiscoPop, Dpo, Dpop, Exo, LengthNormalizedDpo, RobustDpo
from lora_dpo_jax.losses.mix import Mix
from lora_dpo_jax.losses.optimal_transport import Aot, AotUnpaired
from lora_dpo_jax.losses.preference import Compared, ComparisonLoss, PreferenceLoss
from lora_dpo_jax.losses.ranked import PlackettLuce
from lora_dpo_jax.losses.scores import Scores, TokenScores
from lora_dpo_jax.losses.single_answers import ApoZeroUnpaired, Kto

# The keys are the values of `loss.type`.
LOSSES: dict[str, type[Loss]] = {
    "sigmoid": Dpo,
    "sigmoid_norm": LengthNormalizedDpo,
    "hinge": Hinge,
    "ipo": Ipo,
    "exo_pair": Exo,
    "nca_pair": Nca,
    "robust": RobustDpo,
    "bco_pair": Bco,
    "sppo_hard": Sppo,
    "aot": Aot,
    "aot_unpaired": AotUnpaired,
    "apo_zero": ApoZero,
    "apo_down": ApoDown,
    "discopop": DiscoPop,
    "dpop": Dpop,
    "sft": Sft,
    "simpo": SimPo,
    "alphapo": AlphaPo,
    "cpo": Cpo,
    "orpo": Orpo,
    "plackett_luce": PlackettLuce,
    "kto": Kto,
    "apo_zero_unpaired": ApoZeroUnpaired,
    "mix": Mix,
}
for _name, _loss in LOSSES.items():
    Loss.register_subclass(_name, _loss)

__all__ = [
    "LOSSES",
    "AlphaPo",
    "Aot",
    "AotUnpaired",
    "ApoDown",
    "ApoZero",
    "ApoZeroUnpaired",
    "Bco",
    "Compared",
    "ComparisonLoss",
    "Cpo",
    "DiscoPop",
    "Dpo",
    "Dpop",
    "Examples",
    "Exo",
    "Hinge",
    "Ipo",
    "Kto",
    "LengthNormalizedDpo",
    "Loss",
    "Mix",
    "Nca",
    "Orpo",
    "PlackettLuce",
    "PreferenceLoss",
    "RobustDpo",
    "Scores",
    "Sft",
    "SimPo",
    "Sppo",
    "TokenScores",
]
