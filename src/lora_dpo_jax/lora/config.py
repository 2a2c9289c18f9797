"""The settings of adapters."""

import math
import re
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_dpo_jax.settings.choices import check_choices

# Boolean settings that have the same names in adapter_config.json.
PEFT_SWITCHES = ("use_rslora",)


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's options under Levanter's names."""

    r: int = 8  # the rank
    alpha: float = 8.0  # the output of the adapters is scaled by alpha / r
    dropout: float = 0.0  # on the input of the adapters, only in the policy and only in training
    use_rslora: bool = False  # scale by alpha / sqrt(r) (https://arxiv.org/abs/2312.03732) instead of alpha / r
    # A list matches suffixes of dotted paths. A string is a regular expression for the whole path. null means every
    # linear layer of the decoder (not lm_head). Paths are those of Hugging Face: model.layers.0.self_attn.q_proj
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None  # the same syntax
    zero_init_b: bool = True  # with a_init random: B starts at zero. Training always sets it to true
    a_init: Literal["random", "zero"] = "random"  # zero: A starts at zero and B at random; their product is zero too

    def __post_init__(self):
        if self.r < 1:
            raise ValueError(f"lora.r={self.r} must be at least 1")
        if not 0.0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha={self.alpha} must be a positive number")
        if not 0.0 <= np.float32(self.dropout) < 1.0:
            raise ValueError(f"lora.dropout={self.dropout} must be in [0, 1), in float32 too")
        check_choices(self, "lora")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(pattern := getattr(self, name), str):
                _check_pattern(f"lora.{name}", pattern)

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def _check_pattern(setting: str, pattern: str) -> None:
    if pattern == "all-linear":
        here = "leave it out" if setting == "lora.target_modules" else "it would exclude them all"
        raise ValueError(f"{setting}={pattern!r}: PEFT reads this as every linear layer; here, {here}")
    names = [name.strip() for name in pattern.split(",")]
    if len(names) > 1 and all(re.fullmatch(r"[\w.]*", name) for name in names):  # no path has a comma
        raise ValueError(
            f"{setting}={pattern!r}: a text is a regular expression for whole paths; for a list of names write "
            f"'[{', '.join(filter(None, names))}]'"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about syntax that a later Python may read differently
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{setting}={pattern!r} is no regular expression ({error}); write a list for names: [q_proj, v_proj]"
        ) from error
