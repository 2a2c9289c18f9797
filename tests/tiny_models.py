"""Tiny random transformers models, one for each way in which the supported architectures differ, and what tests do
with them.

Norms and biases are random too (transformers starts them at one and zero), so that a forgotten one shows. Weights are
large enough that attention is far from uniform.
"""

import copy
import functools
import json
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import torch
import transformers
from chat_templates import CHATML
from haliax import Axis

from lora_dpo_jax.axes import RANK
from lora_dpo_jax.huggingface.weights import load_model, read_config
from lora_dpo_jax.lora import Adapter, LoraConfig, loraize, map_linear_layers
from lora_dpo_jax.models import CausalLM, ComputeConfig, PackedMask

HIDDEN, VOCAB, LAYERS = 32, 104, 3
LENGTH = 24  # tokens that tests pass through; longer than every window and every original length below

COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN_ROPE = dict(rope_type="yarn", rope_theta=5e5, factor=4.0, original_max_position_embeddings=16)
LONG_ROPE = dict(rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.5)
LONG_ROPE |= dict(short_factor=[1.0, 1.5], long_factor=[2.0, 6.0])
MIXED = dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"], sliding_window=7)
PAD = dict(pad_token_id=0)
EXPERTS = dict(num_experts=6, num_experts_per_tok=3)
ARCHITECTURES: dict[str, transformers.PreTrainedConfig] = {
    "llama2": transformers.LlamaConfig(**COMMON | dict(num_key_value_heads=4)),
    "llama3.1": transformers.LlamaConfig(**COMMON, rope_parameters=LLAMA3_ROPE),
    "llama_linear_rope": transformers.LlamaConfig(
        **COMMON, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=3.0)
    ),
    "llama_dynamic_rope": transformers.LlamaConfig(
        **COMMON | dict(max_position_embeddings=16),
        rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0),
    ),
    "llama_biases": transformers.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "smollm2": transformers.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**COMMON, sliding_window=7, head_dim=8),
    "mistral_full": transformers.MistralConfig(**COMMON, sliding_window=None, head_dim=8),
    "qwen2": transformers.Qwen2Config(**COMMON),
    "qwen2_window": transformers.Qwen2Config(
        **COMMON, use_sliding_window=True, sliding_window=7, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen3": transformers.Qwen3Config(**COMMON, head_dim=16),
}
# One of each further family or, where a family's models differ, a few.
FAMILIES: dict[str, transformers.PreTrainedConfig] = {
    "qwen2_yarn": transformers.Qwen2Config(**COMMON, rope_parameters=YARN_ROPE),
    "smollm3": transformers.SmolLM3Config(**COMMON, **PAD, no_rope_layer_interval=3),
    "smollm3_window": transformers.SmolLM3Config(
        **COMMON,
        **PAD,
        no_rope_layers=[1, 1, 0],
        use_sliding_window=True,
        sliding_window=7,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "olmo2": transformers.Olmo2Config(**COMMON, **PAD),
    "olmo3": transformers.Olmo3Config(
        **COMMON,
        **PAD,
        **MIXED,
        rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=5e5), full_attention=YARN_ROPE),
    ),
    "gemma2": transformers.Gemma2Config(
        **COMMON,
        **PAD,
        **MIXED,
        head_dim=16,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3_text": transformers.Gemma3TextConfig(
        **COMMON, **PAD, sliding_window=7, sliding_window_pattern=3, head_dim=16, query_pre_attn_scalar=24
    ),
    "granite": transformers.GraniteConfig(
        **COMMON,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.2,
        logits_scaling=4.0,
        tie_word_embeddings=True,
    ),
    "glm4": transformers.Glm4Config(**COMMON, **PAD, head_dim=8),
    "cohere2": transformers.Cohere2Config(**COMMON, **PAD, **MIXED, logit_scale=0.25),
    "phi3": transformers.Phi3Config(**COMMON, **PAD, sliding_window=7),
    "phi3_longrope": transformers.Phi3Config(
        **COMMON, **PAD, original_max_position_embeddings=16, rope_parameters=LONG_ROPE, tie_word_embeddings=True
    ),
    "ministral3": transformers.Ministral3Config(
        **COMMON,
        **PAD,
        head_dim=8,
        rope_parameters=YARN_ROPE | dict(mscale=1.0, mscale_all_dim=0.5, llama_4_scaling_beta=0.5),
    ),
    "mixtral": transformers.MixtralConfig(**COMMON, num_local_experts=4),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **COMMON, **EXPERTS, moe_intermediate_size=16, head_dim=8, norm_topk_prob=True, tie_word_embeddings=True
    ),
    "qwen3_moe_dense": transformers.Qwen3MoeConfig(
        **COMMON, **EXPERTS, moe_intermediate_size=16, head_dim=8, mlp_only_layers=[0]
    ),
    "olmoe": transformers.OlmoeConfig(**COMMON, **PAD, **EXPERTS),
    "gpt_oss": transformers.GptOssConfig(
        **COMMON,
        **PAD,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=7,
        swiglu_limit=1.5,  # low enough that some gates are clamped
        rope_parameters=YARN_ROPE | dict(truncate=False),
    ),
}


IMAGES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
IMAGES |= dict(patch_size=14)
# Models of text and images.
WRAPPERS: dict[str, transformers.PreTrainedConfig] = {
    "gemma3": transformers.Gemma3Config(text_config=FAMILIES["gemma3_text"].to_dict(), vision_config=IMAGES),
    "mistral3": transformers.Mistral3Config(
        text_config=FAMILIES["ministral3"].to_dict(),
        vision_config=IMAGES | dict(head_dim=8, model_type="pixtral"),
        tie_word_embeddings=False,
    ),
}


@functools.cache
def tiny_folder(architecture: str) -> Path:
    """The model saved as users find it: float32, with tokenizer, chat template and generation config. Do not write."""
    folder = Path(_session_folder().name) / architecture
    tiny_model(architecture).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, temperature=0.5, do_sample=True).save_pretrained(
        folder
    )
    return folder


def tiny_model(architecture: str, *, seed: int = 0) -> transformers.PreTrainedModel:
    """The random model itself, float32, for evaluation."""
    torch.manual_seed(seed)
    config = copy.deepcopy((ARCHITECTURES | FAMILIES | WRAPPERS)[architecture])  # models write to theirs
    of_images = architecture in WRAPPERS
    kind = transformers.AutoModelForImageTextToText if of_images else transformers.AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.5 * HIDDEN**-0.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
            else:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.eval()


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a character; 101 tokens, fewer than the models' vocabulary, as it often is."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocabulary = [*special, *string.printable[:95], "\n"]
    model = tokenizers.models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
    )
    fast.chat_template = CHATML
    return fast


def in_the_words_of_transformers_4(source: Path, target: Path) -> Path:
    """A copy of a model folder whose config.json is as transformers 4 wrote it."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:  # then a second theta was a key of its own
        rope, local_theta = rope["full_attention"], rope["sliding_attention"]["rope_theta"]
        if local_theta != rope["rope_theta"]:
            config["rope_local_base_freq"] = local_theta
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    (target / "config.json").write_text(json.dumps(config))
    return target


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, shape, dtype=np.int32)


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.float().numpy()


def summed_log_probs(model: Any, prompt: list[int], response: list[int]) -> float:
    """log p(response | prompt) in nats, by a torch model, one sequence at a time, summed in float64."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        log_probs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    at = np.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    return float(log_probs[at, response].double().sum())


def load(
    folder: Path, dtype: Any = jnp.float32, attention: str = "dense", lora: LoraConfig | None = None, **kwargs: Any
) -> CausalLM:
    """The model in a folder, as ours, fit for adapters with these settings. Dense attention is compiled soonest."""
    config = read_config(folder, lora)
    return load_model(folder, config, dtype=dtype, compute=ComputeConfig(attention=attention), **kwargs)


def with_random_adapters(model: CausalLM, config: LoraConfig, *, seed: int = 0) -> CausalLM:
    """Adapters whose product is not zero, of values so coarse that float32 sums of their products are exact."""
    rng = np.random.default_rng(seed)

    def coarse(array: hax.NamedArray) -> hax.NamedArray:
        return hax.named(jnp.asarray(rng.integers(-3, 4, array.array.shape) / 8, dtype=jnp.float32), array.axes)

    def randomize(adapter: Any, _: list[str]) -> Any:
        if not isinstance(adapter, Adapter):
            return adapter
        arrays = {}
        for name, factor in adapter.factors.items():
            array = coarse(factor.array)
            if (RANK,) not in factor.side_names:
                array = factor.array * (1 + array)  # the magnitudes of DoRA
            elif adapter.by_layer is not None:  # a layer has nothing beyond its own rank
                stack = adapter.by_layer.scaling.axes
                ranks = hax.named(np.reshape(adapter.by_layer.ranks, [axis.size for axis in stack]), stack)
                within = hax.arange(array.resolve_axis(RANK)).broadcast_axis(stack) < ranks
                array = (array * within).rearrange(array.axes)
            arrays[name] = array
        return eqx.tree_at(lambda node: [node.factors[name].array for name in arrays], adapter, [*arrays.values()])

    return map_linear_layers(randomize, loraize(model, config, key=jax.random.key(seed)))


@eqx.filter_jit
def logits(model: CausalLM, tokens: np.ndarray) -> jax.Array:
    """Float32 [row, position, vocab], of one unbranched sequence a row."""
    Row, Pos = Axis("row", tokens.shape[0]), Axis("position", tokens.shape[1])
    mask = PackedMask.causal(Row, Pos)
    return model(hax.named(tokens, (Row, Pos)), mask.position_ids, mask).array


@functools.cache
def _session_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="tiny_models_")  # removed when the interpreter exits
