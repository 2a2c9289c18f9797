"""The table of supported families: how each one's `config.json` becomes a `DecoderConfig`.

transformers' own config class reads the file: it fills in what is silent and brings older spellings into one form. What
it does not check, such as the kinds of rotary settings, is checked here, so that each mistake names its key.

Tensors need no table: every family here names them alike, and our modules carry those names.
"""

import copy
import functools
import inspect
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import transformers  # whose names are imported when they are used: torch comes with them, where it is installed

from lora_dpo_jax.json_objects import LARGEST, REQUIRED, JsonObject, brief, is_texts
from lora_dpo_jax.models.config import DecoderConfig
from lora_dpo_jax.models.mlp import ACTIVATIONS
from lora_dpo_jax.models.rope import RopeConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Architecture:
    """What a `model_type` fixes in code."""

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
DERIVED = ("num_key_value_heads", "head_dim", "sliding_window")  # null where transformers knows what follows
SIZES = (*SHAPE, *DERIVED, "vocab_size", "max_position_embeddings")
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor")
USED = {*SIZES, *FLAGS, *ROPE, "model_type", "rms_norm_eps", "hidden_act", "max_window_layers", "layer_types"}
ALL_DIMENSIONS = "1.0: rotary embeddings of some dimensions alone are not supported"
MOST_LAYERS = 10_000  # beyond, a number is a mistake, and per-layer lists of it fill the memory

# Keys that change no logit: initialization, labels, training-time dropout (which TRL turns off as well), and how tensor
# parallelism once split the pretraining. transformers writes them, so they are not worth a word.
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
# More of them, some of other families: private notes, special tokens, dropout, initialization.
HARMLESS_KINDS = re.compile(
    r"_.*|.*_token_id|.*(dropout|pdrop|layerdrop)(_p|_prob|_rate)?|initializer_.*|(embed_)?init_std|seed"
)
# Notes of training programs, of tokenizers and of older versions of transformers, that are known to be no settings.
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
# What transformers reads for every family, beside the settings of each.
OF_EVERY_FAMILY = {"configuration_files", "fusion_config", "is_causal", "per_layer_config", "transformers_weights"}
# The same of transformers, MLX and compressed-tensors.
QUANTIZED = ("quantization_config", "quantization", "compression_config")
ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Reads a parsed `config.json` as transformers does; `where` names the file in errors.

    Raises ValueError for a family or a feature that is not supported, and for a value of the wrong kind. Keys that can
    change no logit are ignored; the log names those that transformers does not write itself.
    """
    given = JsonObject(hf, where)
    model_type = given.text("model_type")
    if model_type not in ARCHITECTURES:
        raise given.error("model_type", f"is not supported; known: {sorted(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    _refuse_features(given)
    _check_kinds(given)
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
            # Qwen2 has no such field, but its attention reads one that is given.
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


def _refuse_features(given: JsonObject) -> None:
    """ValueError for keys that might change a logit; the others that are not used are logged."""
    unused = [key for key in given.values if key not in USED | HARMLESS and not HARMLESS_KINDS.fullmatch(key)]
    unused = [key for key in unused if not _is_off(key, given.values[key])]
    for key in QUANTIZED:
        if key in unused:
            raise given.error(
                key,
                "says that the weights are quantized, and only plain ones are read. Give the checkpoint that it was "
                "quantized from, and set model.quantization: nf4 to hold that in 4 bits",
            )
    features = OF_EVERY_FAMILY & {*unused}
    if unknown := {*unused} - NOTES - {*vars(transformers.GenerationConfig())} - features:
        features |= unknown & _settings_of_families()
    if features:
        found = ", ".join(f"{brief(key)}: {brief(given.values[key])}" for key in sorted(features))
        raise ValueError(f"{given.where}: not supported, so the model would be computed wrongly: {found}")
    if unused:
        _log_ignored(given.where, ", ".join(map(brief, unused)))


@functools.cache  # once, however often the file is read
def _log_ignored(where: str, keys: str) -> None:
    logger.warning("%s: ignored, because no model of transformers reads them: %s", where, keys)


def _is_off(key: str, value: Any) -> bool:
    """A feature that is switched off is no feature."""
    return value is True if key == "is_causal" else value in (None, False, "", [], {})


@functools.cache
def _settings_of_families() -> frozenset[str]:
    """Of all families of transformers that generate text: a config with one of them may be meant for another family."""
    # Takes seconds where torch is installed, so only an unknown key has it imported.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    configs = [transformers.CONFIG_MAPPING[family] for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    return frozenset(name for config in configs for name in inspect.signature(config.__init__).parameters)


def _check_kinds(given: JsonObject) -> None:
    """ValueError that names the first key whose value is of the wrong kind."""
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
    rope = scaling if scaling and scaling.values else parameters  # the older name counts before the newer
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
    """The object of transformers' config class; ValueError with what it says if it takes no such values."""
    used = {key: copy.deepcopy(value) for key, value in given.values.items() if key in USED - {"model_type"}}
    if model_type == "mistral" and "layer_types" in used:
        model_type = "ministral"  # whose layers differ, as its AutoConfig does
    try:
        theirs = transformers.CONFIG_MAPPING[model_type](**used)
        # As its models do when they are built: only then it sees a top-level original_max_position_embeddings.
        theirs.standardize_rope_params()
    except Exception as error:
        raise ValueError(f"{given.where}: transformers does not take it: {' '.join(str(error).split())}") from error
    return theirs


def _windows(architecture: Architecture, theirs: Any, given: JsonObject) -> tuple[int | None, ...] | None:
    """Of each layer, in tokens; None if all see everything."""
    if not architecture.has_windows:
        return None
    window, kinds = theirs.sliding_window, getattr(theirs, "layer_types", None)
    if kinds is None:  # Mistral, of which all layers are alike
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
    # `dynamic` counts from max_position_embeddings even where an original length is given.
    original = rope["original_max_position_embeddings"] if kind == "llama3" else theirs.max_position_embeddings
    numbers = {key: rope[key] for key in ROPE_NUMBERS[kind]}
    return RopeConfig(theta=rope["rope_theta"], type=kind, original_max_position_embeddings=original, **numbers)
