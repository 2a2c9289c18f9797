"""The settings of adapters."""

import dataclasses
import functools
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self, TypeVar

import numpy as np

from lora_dpo_jax.json_objects import is_whole
from lora_dpo_jax.settings.choices import check_choices

_V = TypeVar("_V")

# Boolean settings that have the same names in adapter_config.json.
PEFT_SWITCHES = ("use_rslora", "use_dora")
EMBEDDING, HEAD = "embed_tokens", "lm_head"  # the matrices with a row for each token


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's options under Levanter's names."""

    r: int = 8  # the rank
    alpha: float = 8.0  # the output of the adapters is scaled by alpha / r
    dropout: float = 0.0  # on the input of the adapters, only in the policy and only in training
    use_rslora: bool = False  # scale by alpha / sqrt(r) (https://arxiv.org/abs/2312.03732) instead of alpha / r
    use_dora: bool = False  # train the length of each row of a weight too (https://arxiv.org/abs/2402.09353)
    # A list matches suffixes of dotted paths. A string is a regular expression for the whole path. null means every
    # linear layer of the decoder (not lm_head). Paths are those of Hugging Face: model.layers.0.self_attn.q_proj
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None  # the same syntax
    # Parameters that hold a matrix of every expert: [mlp.experts.gate_up_proj, mlp.experts.down_proj]. They are matched
    # as in a list of target_modules, and are never targets of target_modules.
    target_parameters: list[str] | None = None
    # The rank of layers whose path ends in a key: {q_proj: 16, "layers.[0-3].mlp.up_proj": 4}. A key is a regular
    # expression for whole parts of a path. The first one that matches counts.
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # the alpha of layers, by such keys
    # Only layers of these numbers are targets; null or empty means all. It does not restrict whole paths in a list of
    # target_modules.
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None  # the name before a layer's number, such as layers; null means any
    # Tokens whose rows of the embedding are trained too, such as added ones; of the head too, if the embedding is the
    # head. If it is not: {embed_tokens: [...], lm_head: [...]}.
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    zero_init_b: bool = True  # with a_init random: B starts at zero. Training always sets it to true
    # What A and B start from: docs/adapters.md. random: A Kaiming-uniform, B zero. zero: A zero, B random.
    a_init: Literal["random", "zero", "gaussian", "orthogonal", "pissa", "olora", "eva"] = "random"

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
        self._check_patterns()
        self._check_layers()
        self._check_tokens()
        self._check_parameters()
        if self.use_dora and self.starts_at_factors:
            raise ValueError(
                f"lora.a_init={self.a_init} starts at factors that are not zero, and with lora.use_dora no plain LoRA "
                "can be written for them: set a_init to random, zero or gaussian"
            )
        if self.a_init == "orthogonal" and (odd := [r for r in (self.r, *self.rank_pattern.values()) if r % 2]):
            raise ValueError(f"lora.a_init=orthogonal needs even ranks; lora.r and lora.rank_pattern have {odd}")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def starts_at_factors(self) -> bool:
        """Whether new adapters start at A and B that are both not zero, which the adapter takes away again."""
        return self.a_init in ("orthogonal", *_DOUBLED)

    def as_written(self) -> Self:
        """The settings of the plain adapter that files hold: it has twice the rank if it also takes B0 A0 away."""
        if self.a_init not in _DOUBLED:
            return dataclasses.replace(self, a_init="random")
        factor = math.sqrt(2) if self.use_rslora else 2  # with it, alpha makes the same scaling at twice the rank
        return dataclasses.replace(
            self,
            a_init="random",
            r=2 * self.r,
            alpha=factor * self.alpha,
            rank_pattern={key: 2 * rank for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: factor * alpha for key, alpha in self.alpha_pattern.items()},
        )

    def with_plain_scaling(self, rank: int) -> Self:
        """The settings of one rank for all layers, whose scaling is that of `self` without patterns, as alpha / r."""
        alpha = self.scaling * rank
        return dataclasses.replace(self, use_rslora=False, r=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def for_layer(self, name: str) -> Self:
        """The settings of the layer with this dotted path: the same rank and alpha for all layers."""
        if not (self.rank_pattern or self.alpha_pattern):
            return self
        r = _first_of(self.rank_pattern, name, self.r)
        alpha = _first_of(self.alpha_pattern, name, self.alpha)
        return dataclasses.replace(self, r=r, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def token_rows(self, *, tied: bool) -> dict[str, tuple[int, ...]]:
        """The tokens whose rows are trained, by the name of the matrix. `tied`: the embedding is the head.

        Raises ValueError if a tied head would have other rows than the embedding.
        """
        named = self.trainable_token_indices
        if named is None:
            return {}
        rows = {name: tuple(ids) for name, ids in (named if isinstance(named, dict) else {EMBEDDING: named}).items()}
        if tied and rows.pop(HEAD, rows.get(EMBEDDING)) != rows.get(EMBEDDING):
            raise ValueError(
                f"lora.trainable_token_indices={named}: the embedding of this model is its head, so both must have the "
                "same tokens: write one list"
            )
        return rows

    def _check_tokens(self) -> None:
        named = self.trainable_token_indices
        if named is None:
            return
        parts = named if isinstance(named, dict) else {EMBEDDING: named}
        setting = "lora.trainable_token_indices"
        if unknown := sorted(set(parts) - {EMBEDDING, HEAD}):
            raise ValueError(f"{setting}: {unknown} are no matrices of tokens; there are {EMBEDDING} and {HEAD}")
        for name, ids in parts.items():
            if not ids or not all(is_whole(token, 0) for token in ids):
                raise ValueError(f"{setting}: {name}: {ids} must be token ids, at least one; null trains none")
            if twice := sorted(token for token, count in Counter(ids).items() if count > 1):
                raise ValueError(f"{setting}: {name} names {twice} twice")
        if not parts:
            raise ValueError(f"{setting}={{}} must name a matrix, {EMBEDDING} or {HEAD}; null trains no rows")

    def _check_patterns(self) -> None:
        for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key, value in pattern.items():
                _compiled(f"lora.{name}: the key {key!r}", _SUFFIX.format(key))
                if not 0 < value < math.inf or (name == "rank_pattern" and value < 1):
                    needed = "at least 1" if name == "rank_pattern" else "a positive number"
                    raise ValueError(f"lora.{name}: {key}: {value} must be {needed}")

    def _check_layers(self) -> None:
        numbers, patterns = self.layer_numbers, self.layers_pattern
        if any(number < 0 for number in numbers or ()):
            raise ValueError(f"lora.layers_to_transform={self.layers_to_transform} must be numbers of layers, from 0")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"lora.layers_to_transform={self.layers_to_transform} needs a list in lora.target_modules, or null; "
                f"found the regular expression {self.target_modules!r}, which can name layers itself"
            )
        if patterns and self.layers_to_transform is None:
            raise ValueError(f"lora.layers_pattern={patterns!r} needs lora.layers_to_transform, the numbers of layers")
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            _compiled(f"lora.layers_pattern: {pattern!r}", pattern)

    def _check_parameters(self) -> None:
        """PEFT adapts a parameter itself, W + scaling * B A, whatever is computed with it."""
        if not self.target_parameters:
            return
        names = f"lora.target_parameters={self.target_parameters}"
        if self.dropout:
            raise ValueError(
                f"{names} cannot have dropout on inputs, because PEFT adapts the parameter and not what is multiplied "
                f"by it: set lora.dropout to 0; found {self.dropout}"
            )
        if self.use_dora:
            raise ValueError(
                f"{names} cannot have lora.use_dora: PEFT has no DoRA for parameters. Leave one of them out"
            )
        if self.a_init not in (plain := ("random", "zero", "gaussian")):
            raise ValueError(
                f"{names} cannot have lora.a_init={self.a_init}, which PEFT has for layers alone; needed: {plain}"
            )

    @property
    def layer_numbers(self) -> list[int] | None:
        """`layers_to_transform` as a list; None if it means all layers."""
        numbers = self.layers_to_transform
        return [numbers] if isinstance(numbers, int) else numbers or None


_DOUBLED = ("pissa", "olora")  # values of a_init whose product is not zero
_SUFFIX = r"(.*\.)?({})$"  # PEFT's regular expression for keys of patterns


def matches_suffix(key: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern matches the path of a layer."""
    return _cached(_SUFFIX.format(key)).match(name) is not None


def _first_of(pattern: Mapping[str, _V], name: str, default: _V) -> _V:
    return next((value for key, value in pattern.items() if matches_suffix(key, name)), default)


@functools.lru_cache(maxsize=4096)  # an adapter may have a key for each layer, more than `re` remembers
def _cached(pattern: str) -> re.Pattern:
    return re.compile(pattern)


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
    _compiled(f"{setting}={pattern!r}", pattern, "; write a list for names: [q_proj, v_proj]")


def _compiled(described: str, pattern: str, advice: str = "") -> re.Pattern:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about syntax that a later Python may read differently
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{described} is no regular expression ({error}){advice}") from error
