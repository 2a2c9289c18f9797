"""How the `config.json` of a model becomes a `DecoderConfig`.

The config class of transformers reads the file: it fills in missing keys and converts older spellings. This module
checks what transformers does not check, such as the types of rotary settings, so that each error names its key.
"""

import copy
import dataclasses
import functools
import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import transformers  # its classes are imported on first use, and import torch if it is installed

from lora_dpo_jax.json_objects import LARGEST, JsonObject, brief, is_texts, is_whole
from lora_dpo_jax.models.architectures import ARCHITECTURES, KEYS, WRAPPERS, Architecture, Wrapper
from lora_dpo_jax.models.config import DecoderConfig
from lora_dpo_jax.models.rope import RopeConfig
from lora_dpo_jax.models.rope_json import KEYS as ROPE_KEYS
from lora_dpo_jax.models.rope_json import check_rope, read_rope

logger = logging.getLogger(__name__)


SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DERIVED = ("num_key_value_heads", "head_dim", "sliding_window")  # may be null: transformers then derives them
SIZES = (*SHAPE, *DERIVED, "vocab_size", "max_position_embeddings")
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
# Of every family. A row of ARCHITECTURES adds its own.
USED = {*SIZES, *FLAGS, *ROPE_KEYS, "model_type", "rms_norm_eps", "hidden_act", "max_window_layers", "layer_types"}
EVERY_FAMILY_READS = ("rms_norm_eps", "hidden_act")  # of architectures.KEYS
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
    "output_router_logits",
    "rope_interleaved",
    "router_jitter_noise",
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


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Reads a parsed `config.json` as transformers does; `where` names the file in errors.

    Raises ValueError for a family or a feature that is not supported, and for a value that is not valid. Keys that
    cannot change a logit are ignored; the log names the ignored keys that transformers does not write itself.
    """
    given = JsonObject(hf, where)
    model_type = given.text("model_type")
    if model_type in WRAPPERS:
        return _inside(WRAPPERS[model_type], given)
    if model_type not in ARCHITECTURES:
        raise given.error("model_type", f"is not supported; known: {sorted(ARCHITECTURES | WRAPPERS)}")
    architecture = ARCHITECTURES[model_type]
    _check_features(given, used_keys(architecture), architecture.constants, architecture.quant_methods)
    _check_values(given, architecture)
    theirs = _as_transformers_reads(given, model_type, used_keys(architecture))
    # Qwen2's config class has no head_dim, but its attention uses the value if the file has one.
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    windows = _windows(architecture, theirs, given)
    try:
        return DecoderConfig(
            vocab_size=theirs.vocab_size,
            hidden_size=theirs.hidden_size,
            intermediate_size=theirs.intermediate_size,
            num_layers=theirs.num_hidden_layers,
            num_heads=theirs.num_attention_heads,
            num_kv_heads=theirs.num_key_value_heads,
            head_dim=head_dim,
            max_position_embeddings=theirs.max_position_embeddings,
            tie_word_embeddings=theirs.tie_word_embeddings,
            sliding_windows=windows if any(windows) else None,
            **_ropes(architecture, theirs, windows, head_dim),
            **_biases(architecture, theirs),
            **_experts(architecture, theirs),
            **_other_features(architecture, theirs),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _inside(wrapper: Wrapper, given: JsonObject) -> DecoderConfig:
    """The text model of a model of text and images."""
    _check_features(given, {"model_type", "text_config", "vision_config", "tie_word_embeddings", *wrapper.keys}, {})
    text = given.object("text_config")
    values = {"model_type": wrapper.text_type} | (dict(text.values) if text is not None else {})
    config = config_from_hf(values, f"{given.where}: text_config")
    # The head is the wrapper's. Its classes tie it unless the file says otherwise, whatever the text model's say.
    return dataclasses.replace(config, tie_word_embeddings=given.flag("tie_word_embeddings", True), has_wrapper=True)


def used_keys(architecture: Architecture) -> set[str]:
    """All keys that the configs of a family are read by."""
    return USED | {*architecture.keys, *architecture.other_keys}


def _check_features(
    given: JsonObject, used: set[str], constants: Mapping[str, Any], quant_methods: Sequence[str] = ()
) -> None:
    """Raises ValueError for unused keys that might change a logit, and logs the other unused keys."""
    unused = [key for key in given.values if key not in used | HARMLESS and not HARMLESS_KINDS.fullmatch(key)]
    unused = [key for key in unused if not _is_off(key, given.values[key])]
    unused = [key for key in unused if key not in constants or given.values[key] != constants[key]]
    if is_quantized_by(given.values, quant_methods):
        unused.remove("quantization_config")
    for key in QUANTIZED:
        if key in unused:
            raise given.error(
                key,
                "says that the weights are quantized, which is not supported. Give the model that they were quantized "
                "from, and set model.quantization: nf4 to hold its weights in 4 bits",
            )
    features = (OF_EVERY_FAMILY | {*constants}) & {*unused}
    if unknown := {*unused} - NOTES - {*vars(transformers.GenerationConfig())} - features:
        features |= unknown & _settings_of_families()
    if features:
        found = ", ".join(f"{brief(key)}: {brief(given.values[key])}" for key in sorted(features))
        raise ValueError(f"{given.where}: not supported, so the model would be computed wrongly: {found}")
    if unused:
        _log_ignored(given.where, ", ".join(map(brief, unused)))


def is_quantized_by(values: Mapping[str, Any], quant_methods: Sequence[str]) -> bool:
    """Whether a `config.json` says that its weights are quantized by one of these methods."""
    settings = values.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") in quant_methods


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


def _check_values(given: JsonObject, architecture: Architecture) -> None:
    """Raises ValueError that names the first key whose value is not valid."""
    for key in SIZES:
        given.whole(key, None if key in DERIVED else 1, most=MOST_LAYERS if key == "num_hidden_layers" else LARGEST)
    for key in FLAGS:
        given.flag(key, False)
    for key in (*EVERY_FAMILY_READS, *architecture.keys):
        KEYS[key].check(given, key)
    given.whole("max_window_layers", 0, least=0)
    given.taken("layer_types", None, is_texts, "a list of texts")
    if "sliding_window_pattern" in architecture.other_keys:
        given.whole("sliding_window_pattern", 1)
    if architecture.rope == "no_rope_layers":
        least = _or_default(given, "num_hidden_layers")
        needed = f"a list of 0 and 1, one for each of num_hidden_layers={least}"
        given.taken("no_rope_layers", None, lambda x: _are_switches(x) and len(x) >= least, needed)
        given.whole("no_rope_layer_interval", 1)
    if architecture.experts is not None:
        _check_experts(given)
    check_rope(given, architecture)
    hidden_size, num_heads = _or_default(given, "hidden_size"), _or_default(given, "num_attention_heads")
    if architecture.needs_whole_heads and hidden_size % num_heads:
        raise ValueError(
            f"{given.where}: hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads}"
        )


def _or_default(given: JsonObject, key: str) -> Any:
    """The value, or that of transformers' config class."""
    default = getattr(transformers.CONFIG_MAPPING[given.values["model_type"]], key)
    return given.values.get(key, default)


def _check_experts(given: JsonObject) -> None:
    for key in ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"):
        given.whole(key, 1)
    given.whole("decoder_sparse_step", 1)
    given.flag("norm_topk_prob", False)
    given.number("router_aux_loss_coef", 0.0, least=0.0)
    given.taken("mlp_only_layers", None, _are_layers, "a list of numbers of layers")
    for key in ("swiglu_alpha", "swiglu_limit"):
        given.number(key, 1.0, above=0.0)


def _are_layers(values: Any) -> bool:
    return isinstance(values, list) and all(is_whole(value, 0) for value in values)


def _are_switches(values: Any) -> bool:
    return isinstance(values, list) and all(is_whole(value, 0, 1) for value in values)


def _as_transformers_reads(given: JsonObject, model_type: str, keys: set[str]) -> Any:
    """The config object of transformers. Raises ValueError with its message if transformers rejects the values."""
    used = {key: copy.deepcopy(value) for key, value in given.values.items() if key in keys - {"model_type"}}
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


def _windows(architecture: Architecture, theirs: Any, given: JsonObject) -> tuple[int | None, ...]:
    """The sliding window of each layer in tokens; None = full attention."""
    count = theirs.num_hidden_layers
    if architecture.windows == "none":
        return (None,) * count
    window, kinds = theirs.sliding_window, getattr(theirs, "layer_types", None)
    if not getattr(theirs, "use_sliding_window", True):
        window = None
    of_every_layer = ["full_attention" if window is None else "sliding_attention"] * count
    if kinds is None:
        kinds = of_every_layer
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise given.error("layer_types", f"holds {sorted(unknown)}, which is not supported")
    if window is None and "sliding_attention" in kinds:
        raise given.error(
            "layer_types", "holds sliding_attention, but sliding_window is null or use_sliding_window is not true"
        )
    # A Mistral with layer types was read as the class that obeys them; in other such families, no code reads them.
    if architecture.windows == "every layer" and theirs.model_type != "ministral" and kinds != of_every_layer:
        raise given.error("layer_types", f"has no effect in this family, whose layers are all {of_every_layer[0]}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _ropes(
    architecture: Architecture, theirs: Any, windows: tuple[int | None, ...], head_dim: int
) -> dict[str, RopeConfig | tuple[RopeConfig | None, ...]]:
    """The fields of a DecoderConfig about rotary positions."""

    def read(parameters: Any) -> RopeConfig:
        return read_rope(parameters, theirs, head_dim, architecture)

    if architecture.rope == "by layer type":
        full, sliding = (read(theirs.rope_parameters[kind]) for kind in ("full_attention", "sliding_attention"))
        return {"rope": full, "layer_ropes": tuple(full if window is None else sliding for window in windows)}
    rope = read(theirs.rope_parameters)
    if architecture.rope == "every layer":
        return {"rope": rope}
    of_layers = windows if architecture.rope == "layers with windows" else theirs.no_rope_layers[: len(windows)]
    return {"rope": rope, "layer_ropes": tuple(rope if has_rope else None for has_rope in of_layers)}


def _experts(architecture: Architecture, theirs: Any) -> dict[str, Any]:
    """The fields of a DecoderConfig about experts."""
    if architecture.experts is None:
        return {}
    step, dense = getattr(theirs, "decoder_sparse_step", 1), getattr(theirs, "mlp_only_layers", ())
    of_layers = tuple(
        number % step == 0 and number - 1 not in dense for number in range(1, theirs.num_hidden_layers + 1)
    )
    return {"experts": architecture.experts(theirs), "expert_layers": of_layers}


def _biases(architecture: Architecture, theirs: Any) -> dict[str, bool]:
    configured = "as configured" in architecture.biases and theirs.attention_bias
    return {
        "qkv_bias": configured or architecture.biases == "qkv",
        "attention_out_bias": configured and architecture.biases == "as configured",
    }


def _other_features(architecture: Architecture, theirs: Any) -> dict[str, Any]:
    """The other fields of a DecoderConfig: what the family fixes, and what its keys set."""
    fields = dict(architecture.features)
    if architecture.scales_embeddings:
        fields["embedding_scale"] = theirs.hidden_size**0.5
    for key in (*EVERY_FAMILY_READS, *architecture.keys):
        if hasattr(theirs, key):
            value = getattr(theirs, key)
            fields[KEYS[key].field] = None if value is None else KEYS[key].convert(value)
    return fields
