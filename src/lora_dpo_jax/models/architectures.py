"""The table of supported model families, and how the `config.json` of each becomes a `DecoderConfig`.

The config class of transformers reads the file: it fills in missing keys and converts older spellings. This module
checks what transformers does not check, such as the types of rotary settings, so that each error names its key.

Tensors need no table: all these families use the same tensor names, and our modules have these names.
"""

import copy
import functools
import inspect
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import transformers  # its classes are imported on first use, and import torch if it is installed

from lora_dpo_jax.json_objects import LARGEST, REQUIRED, JsonObject, brief, is_texts
from lora_dpo_jax.models.config import DecoderConfig
from lora_dpo_jax.models.mlp import ACTIVATIONS
from lora_dpo_jax.models.rope import RopeConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Architecture:
    """The features that a `model_type` fixes in code, not in `config.json`."""

    biases: Literal["as configured", "qkv", "none"]
    has_windows: bool = True
    qk_norm: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("as configured", has_windows=False),
    "mistral": Architecture("none"),
    "qwen2": Architecture("qkv"),
    "qwen3": Architecture("as configured", qk_norm=True),
}

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DERIVED = ("num_key_value_heads", "head_dim", "sliding_window")  # may be null: transformers then derives them
SIZES = (*SHAPE, *DERIVED, "vocab_size", "max_position_embeddings")
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor")
USED = {*SIZES, *FLAGS, *ROPE, "model_type", "rms_norm_eps", "hidden_act", "max_window_layers", "layer_types"}
ALL_DIMENSIONS = "1.0: rotary embeddings on only some of the dimensions are not supported"
MOST_LAYERS = 10_000  # a larger number is a mistake, and per-layer lists of that length would fill the memory

# Keys that change no logit: initialization, labels, training-time dropout (which TRL turns off as well), and the tensor
# parallelism of the pretraining. transformers writes them, so they are not logged.
HARMLESS = {
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "rope_interleaved",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "use_cache",
}
# More keys that change no logit, some of other families: private notes, special tokens, dropout, initialization.
HARMLESS_KINDS = re.compile(
    r"_.*|.*_token_id|.*(dropout|pdrop|layerdrop)(_p|_prob|_rate)?|initializer_.*|(embed_)?init_std|seed"
)
# Keys that training programs, tokenizers and older versions of transformers write. None of them is a model setting.
NOTES = {
    "auto_map",
    "gradient_checkpointing",
    "keys_to_ignore_at_inference",
    "model_max_length",
    "neftune_noise_alpha",
    "num_labels",
    "tokenizer_class",
    "torchscript",
    "unsloth_fixed",
    "unsloth_version",
}
# Keys that transformers reads for every family, in addition to the settings of that family.
OF_EVERY_FAMILY = {"configuration_files", "fusion_config", "is_causal", "per_layer_config", "transformers_weights"}
# Keys under which transformers, MLX and compressed-tensors describe quantized weights.
QUANTIZED = ("quantization_config", "quantization", "compression_config")
ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Reads a parsed `config.json` as transformers does; `where` names the file in errors.

    Raises ValueError for a family or a feature that is not supported, and for a value that is not valid. Keys that
    cannot change a logit are ignored; the log names the ignored keys that transformers does not write itself.
    """
    given = JsonObject(hf, where)
    model_type = given.text("model_type")
    if model_type not in ARCHITECTURES:
        raise given.error("model_type", f"is not supported; known: {sorted(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    _check_features(given)
    _check_values(given)
    theirs = _as_transformers_reads(given, model_type)
    windows = _windows(architecture, theirs, given)
    configured_bias = architecture.biases == "as configured" and theirs.attention_bias
    try:
        return DecoderConfig(
            vocab_size=theirs.vocab_size,
            hidden_size=theirs.hidden_size,
            intermediate_size=theirs.intermediate_size,
            num_layers=theirs.num_hidden_layers,
            num_heads=theirs.num_attention_heads,
            num_kv_heads=theirs.num_key_value_heads,
            # Qwen2's config class has no such field, but its attention uses the value if the file has one.
            head_dim=getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
            max_position_embeddings=theirs.max_position_embeddings,
            rope=_rope(theirs),
            rms_norm_eps=theirs.rms_norm_eps,
            activation=theirs.hidden_act,
            tie_word_embeddings=theirs.tie_word_embeddings,
            qkv_bias=configured_bias or architecture.biases == "qkv",
            attention_out_bias=configured_bias,
            mlp_bias=model_type == "llama" and theirs.mlp_bias,
            qk_norm=architecture.qk_norm,
            sliding_windows=windows,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_features(given: JsonObject) -> None:
    """Raises ValueError for unused keys that might change a logit, and logs the other unused keys."""
    unused = [key for key in given.values if key not in USED | HARMLESS and not HARMLESS_KINDS.fullmatch(key)]
    unused = [key for key in unused if not _is_off(key, given.values[key])]
    for key in QUANTIZED:
        if key in unused:
            raise given.error(
                key,
                "says that the weights are quantized, which is not supported. Give the model that they were quantized "
                "from, and set model.quantization: nf4 to hold its weights in 4 bits",
            )
    features = OF_EVERY_FAMILY & {*unused}
    if unknown := {*unused} - NOTES - {*vars(transformers.GenerationConfig())} - features:
        features |= unknown & _settings_of_families()
    if features:
        found = ", ".join(f"{brief(key)}: {brief(given.values[key])}" for key in sorted(features))
        raise ValueError(f"{given.where}: not supported, so the model would be computed wrongly: {found}")
    if unused:
        _log_ignored(given.where, ", ".join(map(brief, unused)))


@functools.cache  # logs once, even if the file is read several times
def _log_ignored(where: str, keys: str) -> None:
    logger.warning("%s: ignored, because no model of transformers reads them: %s", where, keys)


def _is_off(key: str, value: Any) -> bool:
    """Whether `value` switches the feature `key` off: the key then changes no logit."""
    return value is True if key == "is_causal" else value in (None, False, "", [], {})


@functools.cache
def _settings_of_families() -> frozenset[str]:
    """The settings of all text-generation families of transformers.

    A config with one of these may be meant for another family.
    """
    # This import takes seconds if torch is installed, so it is done only for an unknown key.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    configs = [transformers.CONFIG_MAPPING[family] for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    return frozenset(name for config in configs for name in inspect.signature(config.__init__).parameters)


def _check_values(given: JsonObject) -> None:
    """Raises ValueError that names the first key whose value is not valid."""
    for key in SIZES:
        default = REQUIRED if key in SHAPE else None if key in DERIVED else 1
        given.whole(key, default, most=MOST_LAYERS if key == "num_hidden_layers" else LARGEST)
    for key in FLAGS:
        given.flag(key, False)
    given.whole("max_window_layers", 0, least=0)
    given.number("rms_norm_eps", 0.0, least=0.0)
    given.number("rope_theta", 1.0, above=0.0)
    given.taken("layer_types", None, is_texts, "a list of texts")
    given.taken("hidden_act", "silu", lambda name: name in [*ACTIVATIONS], f"one of {sorted(ACTIVATIONS)}")
    given.taken("partial_rotary_factor", None, lambda factor: factor == 1, ALL_DIMENSIONS)
    _check_rope(given)
    hidden_size, num_heads = given.values["hidden_size"], given.values["num_attention_heads"]
    if given.values["model_type"] == "llama" and hidden_size % num_heads:
        raise given.error("hidden_size", f"is not a multiple of num_attention_heads={num_heads}")


def _check_rope(given: JsonObject) -> None:
    scaling, parameters = given.object("rope_scaling"), given.object("rope_parameters")
    rope = scaling if scaling and scaling.values else parameters  # the older key takes precedence
    if rope is None:
        return
    if of_layers := [key for key, value in rope.values.items() if isinstance(value, dict)]:
        raise rope.error(of_layers[0], "is not supported: all layers must have the same rotary settings")
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_NUMBERS:
        raise ValueError(f"{rope.where}: rope_type={brief(kind)} is not supported; known: {sorted(ROPE_NUMBERS)}")
    rope.taken("partial_rotary_factor", None, lambda factor: factor == 1, ALL_DIMENSIONS)
    rope.number("rope_theta", 1.0, above=0.0)
    for key in ROPE_NUMBERS[kind]:
        rope.number(key, above=0.0)
    if kind == "llama3":
        for settings in (rope, given):
            settings.whole("original_max_position_embeddings", 1)
        if rope.values["high_freq_factor"] <= (low := rope.values["low_freq_factor"]):
            raise rope.error("high_freq_factor", f"must be above low_freq_factor={low}")


def _as_transformers_reads(given: JsonObject, model_type: str) -> Any:
    """The config object of transformers. Raises ValueError with its message if transformers rejects the values."""
    used = {key: copy.deepcopy(value) for key, value in given.values.items() if key in USED - {"model_type"}}
    if model_type == "mistral" and "layer_types" in used:
        model_type = "ministral"  # as AutoConfig does: the layers of this family may differ
    try:
        theirs = transformers.CONFIG_MAPPING[model_type](**used)
        # The models of transformers make this call when they are built. Only this call reads a top-level
        # original_max_position_embeddings.
        theirs.standardize_rope_params()
    except Exception as error:
        raise ValueError(f"{given.where}: transformers rejects it: {' '.join(str(error).split())}") from error
    return theirs


def _windows(architecture: Architecture, theirs: Any, given: JsonObject) -> tuple[int | None, ...] | None:
    """The sliding window of each layer in tokens; None if all layers have full attention."""
    if not architecture.has_windows:
        return None
    window, kinds = theirs.sliding_window, getattr(theirs, "layer_types", None)
    if kinds is None:  # Mistral, whose layers are all the same
        kinds = ["full_attention" if window is None else "sliding_attention"] * theirs.num_hidden_layers
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise given.error("layer_types", f"holds {sorted(unknown)}, which is not supported")
    if window is None and "sliding_attention" in kinds:
        raise given.error(
            "layer_types", "holds sliding_attention, but sliding_window is null or use_sliding_window is not true"
        )
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else None


def _rope(theirs: Any) -> RopeConfig:
    rope = theirs.rope_parameters
    kind = rope["rope_type"]
    # `dynamic` scales from max_position_embeddings even if an original length is given.
    original = rope["original_max_position_embeddings"] if kind == "llama3" else theirs.max_position_embeddings
    numbers = {key: rope[key] for key in ROPE_NUMBERS[kind]}
    return RopeConfig(theta=rope["rope_theta"], type=kind, original_max_position_embeddings=original, **numbers)
