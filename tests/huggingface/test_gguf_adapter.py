"""GGUF adapters hold what llama.cpp adds to each layer; read back by gguf, with the order of transformers' reader."""

import gguf
import numpy as np
import pytest
import transformers
from tiny_models import load, tiny_folder, with_random_adapters
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from lora_dpo_jax.huggingface.adapters import layer_adapters
from lora_dpo_jax.huggingface.gguf_adapter import FILE, check_gguf, check_gguf_layers, save_gguf
from lora_dpo_jax.lora import LoraConfig
from lora_dpo_jax.models import family_in_llama_cpp
from lora_dpo_jax.models.architectures import ARCHITECTURES

PLAIN = LoraConfig(r=4, alpha=6.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
ATTENTION = LoraConfig(r=2, alpha=6.0, target_modules=["q_proj", "k_proj", "o_proj"])
FUSED = LoraConfig(r=2, target_modules=["qkv_proj", "gate_up_proj", "down_proj"])
PATTERNS = LoraConfig(
    r=4, alpha=6.0, use_rslora=True, target_modules=["q_proj", "up_proj", "lm_head"],
    rank_pattern={"1.*q_proj": 2}, alpha_pattern={"up_proj": 3.0},
)  # fmt: skip
# An architecture, settings, the family's name, and the names of some tensors.
CASES = {
    "llama3.1": (PLAIN, "llama", ["blk.0.attn_q.weight.lora_a", "blk.2.ffn_down.weight.lora_b"]),
    "mistral": (PATTERNS, "llama", ["blk.1.attn_q.weight.lora_b", "output.weight.lora_a"]),
    "llama2": (LoraConfig(r=2, a_init="pissa", target_modules=["k_proj"]), "llama", ["blk.0.attn_k.weight.lora_a"]),
    "qwen3": (PATTERNS, "qwen3", ["blk.0.ffn_up.weight.lora_a"]),
    "gemma3": (PLAIN, "gemma3", ["blk.0.attn_output.weight.lora_b"]),
    "mistral3": (PLAIN, "mistral3", ["blk.0.attn_v.weight.lora_b"]),
    "phi3": (FUSED, "phi3", ["blk.0.attn_qkv.weight.lora_a", "blk.0.ffn_up.weight.lora_a"]),
    "mixtral": (ATTENTION, "llama", ["blk.0.attn_q.weight.lora_a"]),
}
# Every matrix of the experts; and some of them, at two ranks and two scalings.
OF_EXPERTS = {
    "mixtral": LoraConfig(r=2, alpha=6.0, target_modules=["w1", "w2", "w3"]),
    "qwen3_moe": LoraConfig(
        r=2, alpha=6.0, target_modules=["experts.1.up_proj", "experts.4.up_proj"],
        rank_pattern={"4.up_proj": 3}, alpha_pattern={"1.up_proj": 2.0},
    ),
}  # fmt: skip


class Reversed(LlamaTensorProcessor):
    """What transformers does to queries and keys of GGUF files of these families."""

    families = ("llama", "mistral3")


def read(path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


@pytest.mark.parametrize("architecture", CASES)
def test_llama_cpp_adds_what_the_adapter_adds(architecture, tmp_path):
    config, family, some = CASES[architecture]
    source = tiny_folder(architecture)
    model = with_random_adapters(load(source), config)
    check_gguf(config, source)
    check_gguf_layers(model, source)
    save_gguf(model, tmp_path, source=source)
    fields, tensors = read(tmp_path / FILE)
    assert (fields["general.architecture"], fields["general.type"]) == (family, "adapter")
    assert fields["adapter.type"] == "lora"
    assert set(some) <= set(tensors)

    settings = model.config
    heads = {"num_attention_heads": settings.num_heads, "num_key_value_heads": settings.num_kv_heads}
    theirs = {name: None for name in tensors}
    expected = layer_adapters(model)
    assert len(tensors) == 2 * len(expected)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family)
    names = gguf.get_tensor_name_map(arch, settings.num_layers)
    for adapter in expected:
        name = names.get_name(adapter.name.replace("language_model.", ""))
        lora_a, lora_b = (tensors[f"{name}.weight.lora_{side}"] for side in "ab")
        assert lora_a.dtype == lora_b.dtype == np.float32
        delta = fields["adapter.lora.alpha"] / lora_b.shape[1] * lora_b @ lora_a  # as llama.cpp scales it
        if family in Reversed.families:
            delta = Reversed(heads).process(delta, f"{name}.weight").weights
        own = adapter.scaling * adapter.tensors["lora_B.weight"] @ adapter.tensors["lora_A.weight"]
        np.testing.assert_allclose(delta, own, rtol=1e-5, atol=1e-6)
        theirs.pop(f"{name}.weight.lora_a")
    assert all(key.endswith(".lora_b") for key in theirs)


@pytest.mark.parametrize("architecture", OF_EXPERTS)
def test_experts_are_one_tensor(architecture, tmp_path):
    source = tiny_folder(architecture)
    model = with_random_adapters(load(source), OF_EXPERTS[architecture])
    check_gguf_layers(model, source)
    save_gguf(model, tmp_path, source=source)
    fields, tensors = read(tmp_path / FILE)
    matrices = {"w1": "gate", "w2": "down", "w3": "up", "up_proj": "up"}
    seen = set()
    for adapter in layer_adapters(model):
        *_, number, matrix = adapter.name.split(".")
        layer = adapter.name.split(".")[2]
        name = f"blk.{layer}.ffn_{matrices[matrix]}_exps"
        lora_a, lora_b = (tensors[f"{name}.weight.lora_{side}"] for side in "ab")
        seen |= {f"{name}.weight.lora_a", f"{name}.weight.lora_b"}
        scale = fields["adapter.lora.alpha"] / lora_b.shape[-1]
        delta = scale * lora_b[int(number)] @ lora_a[int(number)]
        own = adapter.scaling * adapter.tensors["lora_B.weight"] @ adapter.tensors["lora_A.weight"]
        np.testing.assert_allclose(delta, own, rtol=1e-5, atol=1e-6)
    assert seen == set(tensors)
    if architecture == "qwen3_moe":
        up = tensors["blk.0.ffn_up_exps.weight.lora_b"]
        assert up.shape == (6, 16, 3) and not up[[0, 2, 3, 5]].any()


def test_a_plain_adapter_keeps_its_alpha_and_its_factors(tmp_path):
    model = with_random_adapters(load(tiny_folder("qwen3")), PLAIN)
    save_gguf(model, tmp_path / "f32", source=tiny_folder("qwen3"))
    save_gguf(model, tmp_path / "f16", source=tiny_folder("qwen3"), dtype=np.float16)
    fields, tensors = read(tmp_path / "f32" / FILE)
    _, halves = read(tmp_path / "f16" / FILE)
    assert fields["adapter.lora.alpha"] == 6.0
    (q, *_) = layer_adapters(model)
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight.lora_b"], q.tensors["lora_B.weight"])
    for name, values in halves.items():
        assert values.dtype == np.float16
        np.testing.assert_array_equal(values, tensors[name].astype(np.float16))


def test_every_family_has_a_name_that_gguf_knows():
    for model_type in ARCHITECTURES:
        family, _ = family_in_llama_cpp({"model_type": model_type})
        assert family in gguf.MODEL_ARCH_NAMES.values(), model_type
    text = transformers.Mistral3Config().to_dict()
    assert family_in_llama_cpp(text) == ("mistral3", True)
    assert family_in_llama_cpp({"model_type": "wav2vec2"}) == ("", False)


@pytest.mark.parametrize(
    "settings, told",
    [
        (dict(use_dora=True), "lora.use_dora=True has no form in a GGUF adapter; export a merged model"),
        (dict(trainable_token_indices=[3]), r"lora.trainable_token_indices=\[3\] has no form in a GGUF adapter"),
    ],
)
def test_what_llama_cpp_has_no_form_for_is_refused_before_anything_is_trained(settings, told, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], **settings)
    with pytest.raises(ValueError, match=told):
        check_gguf(config, tiny_folder("smollm2"))
    model = with_random_adapters(load(tiny_folder("smollm2")), config)
    with pytest.raises(ValueError, match="has no form in a GGUF adapter"):
        save_gguf(model, tmp_path / "out", source=tiny_folder("smollm2"))
    assert not (tmp_path / "out").exists()


def test_layers_and_families_that_llama_cpp_does_not_know_are_refused(tmp_path):
    config = LoraConfig(r=2, target_modules=["qkv_proj"])
    model = with_random_adapters(load(tiny_folder("phi3")), config)
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(ValueError, match=r"0\.self_attn\.qkv_proj has no form in a GGUF adapter.* only other layers"):
        check_gguf_layers(model, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match=r"config.json: model_type='mamba' has no form"):
        check_gguf(config, tmp_path)


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'lora_dpo_jax\[gguf\]'"):
        check_gguf(PLAIN, tiny_folder("smollm2"))
