"""DPO and similar losses: the log-likelihood of the preferences under a logistic model of the rewards."""

import math
from dataclasses import dataclass

import haliax as hax
from haliax import NamedArray

from lora_dpo_jax.losses.examples import Examples
from lora_dpo_jax.losses.preference import PreferenceLoss
from lora_dpo_jax.losses.smoothing import check_label_smoothing, smoothed_log_loss


@dataclass(frozen=True)
class Dpo(PreferenceLoss):
    """Eq. 7 of https://arxiv.org/abs/2305.18290.

    With label smoothing, it is conservative DPO, as in `smoothed_log_loss`. TRL 1.16 ignores the label_smoothing of its
    loss `sigmoid`.
    """

    label_smoothing: float = 0.0  # the probability that a label is wrong (cDPO); 0 <= label_smoothing < 0.5

    name = "dpo"

    def __post_init__(self):
        super().__post_init__()
        check_label_smoothing(self.label_smoothing)

    def pair_loss(self, chosen, rejected, policy):
        return smoothed_log_loss(self.beta * (chosen - rejected), self.label_smoothing)


@dataclass(frozen=True)
class LengthNormalizedDpo(Dpo):
    """DPO on log-ratios per token: section 5.1.3 of Tulu 3, https://arxiv.org/abs/2411.15124."""

    per_token_rewards = True


@dataclass(frozen=True)
class RobustDpo(PreferenceLoss):
    """An unbiased estimate of DPO's loss on clean labels: https://arxiv.org/abs/2403.00409."""

    label_smoothing: float = 0.1  # the probability that a label is wrong; 0 <= label_smoothing < 0.5. 0 is sigmoid

    def __post_init__(self):
        super().__post_init__()
        check_label_smoothing(self.label_smoothing)

    def pair_loss(self, chosen, rejected, policy):
        logits, wrong = self.beta * (chosen - rejected), self.label_smoothing
        return ((1 - wrong) * hax.nn.softplus(-logits) - wrong * hax.nn.softplus(logits)) / (1 - 2 * wrong)


@dataclass(frozen=True)
class Exo(PreferenceLoss):
    """The KL divergence of the rewards' distribution over the pair from the labels': Eq. 16 of
    https://arxiv.org/abs/2402.00856."""

    label_smoothing: float = 1e-3  # the labels' probability of the rejected response; 0 < label_smoothing < 0.5

    def __post_init__(self):
        super().__post_init__()
        check_label_smoothing(self.label_smoothing)
        if self.label_smoothing == 0.0:
            raise ValueError(
                "loss.label_smoothing=0.0 makes the loss exo_pair infinite; needed: more than 0, for example 1e-3"
            )

    def pair_loss(self, chosen, rejected, policy):
        logits = self.beta * (chosen - rejected)
        of_chosen = -hax.nn.softplus(-logits) - math.log1p(-self.label_smoothing)
        of_rejected = -hax.nn.softplus(logits) - math.log(self.label_smoothing)
        return hax.nn.sigmoid(logits) * of_chosen + hax.nn.sigmoid(-logits) * of_rejected


@dataclass(frozen=True)
class DiscoPop(PreferenceLoss):
    """A blend of logistic and exponential loss, found by a language model: Eq. 5 of https://arxiv.org/abs/2406.08414."""

    discopop_tau: float = 0.05  # how soon the blend changes with the margin; 0 < discopop_tau <= 1

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 < self.discopop_tau <= 1.0:
            raise ValueError(
                f"loss.discopop_tau={self.discopop_tau} must be in (0, 1]: above 1, the loss grows exponentially with "
                "the margin of a wrong pair"
            )

    @property
    def warning(self) -> str | None:
        # The slope at 0 is (1 - log 2) / (4 tau) - 3/4.
        if self.discopop_tau > (least := (1 - math.log(2)) / 3):
            return None
        return (
            f"loss.discopop_tau={self.discopop_tau}: where policy and reference are equal, the loss falls as the "
            f"rejected response becomes likelier, so a run may learn the opposite of its labels. Above {least:.4f} it "
            "falls as the chosen one does."
        )

    def pair_loss(self, chosen, rejected, policy):
        logits = self.beta * (chosen - rejected)
        modulation = logits / self.discopop_tau
        # exp(-logits) alone may be infinite where its factor is 0.
        exponential = hax.exp(-logits - hax.nn.softplus(-modulation))
        return hax.nn.softplus(-logits) * hax.nn.sigmoid(-modulation) + exponential


@dataclass(frozen=True)
class Dpop(PreferenceLoss):
    """DPO-Positive: DPO with a penalty where the chosen response becomes less likely than under the reference.

    Eq. 3 of https://arxiv.org/abs/2402.13228.
    """

    dpop_lambda: float = 50.0  # the weight of the penalty, in nats of margin per nat

    is_of_margin = False

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.dpop_lambda < math.inf:
            raise ValueError(f"loss.dpop_lambda={self.dpop_lambda} must be at least 0, and finite")

    def loss_where_equal(self, examples: Examples) -> float | None:
        """None: the penalty counts each fall of a chosen log-prob 50 times, those by rounding too."""
        return None

    def pair_loss(self, chosen, rejected, policy):
        margin: NamedArray = chosen - rejected - self.dpop_lambda * hax.nn.relu(-chosen)
        return hax.nn.softplus(-self.beta * margin)
