"""Losses of a whole ranking of an example's responses."""

from dataclasses import dataclass

import haliax as hax
import jax

from lora_dpo_jax.axes import RESPONSE
from lora_dpo_jax.losses.examples import add_up, greatest, take
from lora_dpo_jax.losses.preference import PreferenceLoss


@dataclass(frozen=True)
class PlackettLuce(PreferenceLoss):
    """The likelihood of a ranking if its responses are chosen one after the other, the best one first.

    Appendix A.3 of https://arxiv.org/abs/2305.18290. Each response is chosen from itself and all that it is compared
    with as the better one. So a pair has the loss `sigmoid`, and tied responses that are compared both ways have
    Breslow's approximation.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.use_weighting:
            raise ValueError(
                "loss.use_weighting=true weighs single pairs, and loss.type=plackett_luce is of whole rankings: leave "
                "use_weighting out"
            )

    @property
    def takes_margins(self) -> bool:
        return False

    def pair_loss(self, chosen, rejected, policy):
        """An example's loss is the sum over its choices; each is spread over the comparisons that make it up."""
        examples = policy.examples
        Response, share = examples.example_of_response.resolve_axis(RESPONSE), examples.share
        counts = share > 0
        index = hax.where(counts, examples.chosen, -1)
        odds = self.beta * (rejected - chosen)  # log of those of each worse response against the chosen one
        top = take(jax.lax.stop_gradient(greatest(odds, index, Response)), RESPONSE, index)
        total = take(add_up(hax.exp(hax.where(counts, odds - top, 0.0)), index, Response), RESPONSE, index)
        choice = hax.nn.softplus(top + hax.log(hax.where(counts, total, 1.0)))
        of_choice = take(add_up(share, index, Response), RESPONSE, index)
        return choice / hax.where(counts, of_choice, 1.0)
