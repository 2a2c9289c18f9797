"""The logistic loss of labels that may be wrong."""

import haliax as hax
import numpy as np
from haliax import NamedArray


def smoothed_log_loss(logits: NamedArray, label_smoothing: float) -> NamedArray:
    """-log sigmoid(logits), if a label is wrong with the probability `label_smoothing`.

    Eq. 3 of https://ericmitchell.ai/cdpo.pdf.
    """
    # softplus(-x) is -log sigmoid(x) without overflow.
    kept = hax.nn.softplus(-logits)
    if label_smoothing == 0.0:
        return kept
    return (1 - label_smoothing) * kept + label_smoothing * hax.nn.softplus(logits)


def check_label_smoothing(value: float) -> None:
    """Raises ValueError unless it is a probability below one half."""
    if not 0.0 <= np.float32(value) < 0.5:
        raise ValueError(f"loss.label_smoothing={value} must be in [0, 0.5), in float32 too")
