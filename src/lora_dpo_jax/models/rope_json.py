"""The rotary settings of `config.json`: their checks, and how they become a `RopeConfig`."""

import math
from collections.abc import Mapping
from typing import Any

from lora_dpo_jax.json_objects import REQUIRED, JsonObject, brief, is_number
from lora_dpo_jax.models.architectures import Architecture
from lora_dpo_jax.models.rope import RopeConfig

# The keys that hold the rotary settings, or one of them.
KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor")
LAYER_TYPES = ("full_attention", "sliding_attention")
ALL_DIMENSIONS = "1.0: rotary embeddings on only some of the dimensions are not supported in this family"
SOME_DIMENSIONS = "a number above 0 and at most 1"
# By type: numbers that are needed, and numbers that may be null or absent.
NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": ((), ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")),
    "longrope": ((), ("factor", "attention_factor")),
}
FORMER_NAMES = {"su": "longrope"}
HAVE_ORIGINAL = ("llama3", "yarn", "longrope")


def check_rope(given: JsonObject, architecture: Architecture) -> None:
    """Raises ValueError that names the first rotary setting whose value is not valid."""
    given.number("rope_theta", 1.0, above=0.0)
    given.number("rope_local_base_freq", 1.0, above=0.0)
    _check_partial(given, architecture, default=None)
    scaling, parameters = given.object("rope_scaling"), given.object("rope_parameters")
    if architecture.rope == "by layer type":
        if scaling is not None and scaling.values:
            _check_one(scaling, given, architecture)
        of_types = [] if parameters is None else [parameters.object(layer_type) for layer_type in LAYER_TYPES]
        for rope in filter(None, of_types):
            _check_one(rope, given, architecture)
        return
    rope = scaling if scaling and scaling.values else parameters  # the older key takes precedence
    if rope is not None:
        _check_one(rope, given, architecture)


def _check_one(rope: JsonObject, given: JsonObject, architecture: Architecture) -> None:
    if of_layers := [key for key, value in rope.values.items() if isinstance(value, dict)]:
        raise rope.error(of_layers[0], "is not supported: all layers must have the same rotary settings")
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    kind = FORMER_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in NUMBERS:
        raise ValueError(f"{rope.where}: rope_type={brief(kind)} is not supported; known: {sorted(NUMBERS)}")
    _check_partial(rope, architecture)
    rope.number("rope_theta", 2.0, above=1.0 if kind == "yarn" else 0.0)
    needed, optional = NUMBERS[kind]
    for key in needed:
        rope.number(key, above=0.0)
    for key in optional:
        rope.number(key, None, least=0.0)
    if kind in HAVE_ORIGINAL:
        for settings in (rope, given):
            settings.whole("original_max_position_embeddings", 2, least=2 if kind == "longrope" else 1)
    if kind == "llama3" and rope.values["high_freq_factor"] <= (low := rope.values["low_freq_factor"]):
        raise rope.error("high_freq_factor", f"must be above low_freq_factor={low}")
    if kind == "yarn":
        rope.flag("truncate", True)
        rope.taken("factor", REQUIRED, lambda x: x is None or is_number(x) and x > 0, "a positive number or null")
    if kind == "longrope":
        for key in ("short_factor", "long_factor"):
            rope.taken(key, REQUIRED, _are_positive, "a list of positive numbers")
    if architecture.has_query_scale:
        rope.number("llama_4_scaling_beta", least=0.0)
        rope.whole("original_max_position_embeddings")


def _check_partial(given: JsonObject, architecture: Architecture, default: float | None = 1.0) -> None:
    """null is allowed if `default` is None."""
    if architecture.has_partial_rope:
        given.taken("partial_rotary_factor", 1.0, lambda x: is_number(x) and 0 < x <= 1, SOME_DIMENSIONS)
    else:
        given.taken("partial_rotary_factor", default, lambda factor: factor == 1, ALL_DIMENSIONS)


def _are_positive(values: Any) -> bool:
    return isinstance(values, list) and all(is_number(value) and value > 0 for value in values)


def read_rope(rope: Mapping[str, Any], theirs: Any, head_dim: int, architecture: Architecture) -> RopeConfig:
    """From the settings of all layers, or of one type of layers, in transformers' config object `theirs`."""
    kind, longest = rope["rope_type"], theirs.max_position_embeddings
    # `dynamic` scales from max_position_embeddings even if an original length is given.
    has_original = kind in HAVE_ORIGINAL or architecture.has_query_scale
    original = rope["original_max_position_embeddings"] if has_original else longest
    partial = rope.get("partial_rotary_factor") if architecture.has_partial_rope else None
    needed, _ = NUMBERS[kind]
    fields: dict[str, Any] = {key: rope[key] for key in needed}
    if kind in ("yarn", "longrope"):
        factor = rope.get("factor")
        factor = longest / original if factor is None else factor
        fields = {"factor": factor, "magnitude": _magnitude(kind, rope, factor, original)}
    if kind == "yarn":
        betas = {"beta_fast": 32.0, "beta_slow": 1.0}
        fields |= {key: rope.get(key) or default for key, default in betas.items()}
        # transformers looks for this switch beside the settings of layer types, never within.
        fields["truncate"] = theirs.rope_parameters.get("truncate", True)
    if kind == "longrope":
        fields |= {key: tuple(map(float, rope[key])) for key in ("short_factor", "long_factor")}
    return RopeConfig(
        theta=rope["rope_theta"],
        type=kind,
        original_max_position_embeddings=original,
        rotary_dims=None if partial is None else int(head_dim * partial),
        interleaved=architecture.has_interleaved_rope,
        query_scale_beta=rope["llama_4_scaling_beta"] if architecture.has_query_scale else 0.0,
        **fields,
    )


def _magnitude(kind: str, rope: Mapping[str, Any], factor: float, original: int) -> float:
    """What transformers calls the attention factor."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if kind == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))

    def grown(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    mscale, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    return grown(mscale) / grown(of_all) if mscale and of_all else grown(1.0)
