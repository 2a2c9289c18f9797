import functools
import json
import shutil
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny_models import (
    LENGTH,
    load,
    logits,
    random_tokens,
    tiny_folder,
    tiny_tokenizer,
    torch_logits,
    with_random_adapters,
)

from lora_dpo_jax.huggingface.adapters import (
    base_from_anywhere,
    layer_adapters,
    load_adapter,
    read_adapter_config,
    save_adapter,
)
from lora_dpo_jax.huggingface.servers import PEFT, AdapterFiles, verdicts
from lora_dpo_jax.huggingface.weights import save_merged
from lora_dpo_jax.lora import ROWS, LoraConfig, LoraLinear, linear_layers, merge_lora
from lora_dpo_jax.models import CausalLM

# PEFT asks transformers for what transformers has renamed.
RENAMED = "`is_gradient_checkpointing` is deprecated"
pytestmark = pytest.mark.filterwarnings(f"ignore:{RENAMED}:FutureWarning")

TOKENS = random_tokens(2, LENGTH)
SUBSET = r"model\.layers\.[02]\..*\.(q|down)_proj"
# An architecture and our settings of an adapter for it.
CASES = {
    "every_linear_layer_of_a_tied_model": ("smollm2", LoraConfig(r=4, alpha=8.0)),
    "rslora": ("llama_biases", LoraConfig(r=4, alpha=6.0, use_rslora=True, target_modules=["q_proj", "v_proj"])),
    "lm_head": ("qwen3", LoraConfig(r=3, alpha=4.5, target_modules=["o_proj", "lm_head"])),
    "some_layers": ("mistral", LoraConfig(r=4, alpha=8.0, target_modules=SUBSET)),
    "patterns": (
        "qwen2",
        LoraConfig(
            r=4,
            alpha=8.0,
            rank_pattern={r"layers\.1\.self_attn\.q_proj": 6, "v_proj": 2, "q_proj": 3},
            alpha_pattern={"layers.[12].*proj": 4.5},
            layers_to_transform=[0, 1],
            target_modules=["q_proj", "v_proj", "up_proj", "model.layers.2.mlp.down_proj"],
        ),
    ),
    "dora": ("qwen2", LoraConfig(r=4, alpha=8.0, use_dora=True, rank_pattern={"2.self_attn.q_proj": 3})),
    "pissa": (
        "llama_biases",
        LoraConfig(r=4, alpha=6.0, a_init="pissa", use_rslora=True, target_modules=["q_proj"], rank_pattern={"1.*": 2}),
    ),
    "token_rows": ("smollm2", LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[103, 5, 9])),
    "token_rows_of_two_matrices": (
        "qwen2",
        LoraConfig(
            r=4, target_modules=["o_proj"], trainable_token_indices={"embed_tokens": [103, 5], "lm_head": [9, 5, 7]}
        ),
    ),
    "all_but_excluded": ("qwen2", LoraConfig(r=4, alpha=8.0, exclude_modules=["down_proj", "1.self_attn.k_proj"])),
}


@functools.cache
def plain_model(architecture: str, dtype=jnp.float32) -> CausalLM:
    return load(tiny_folder(architecture), dtype)


def transformers_model(folder: Path, dtype: str = "float32"):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def peft_model(base: Path, adapter: Path, dtype: str = "float32") -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=RENAMED)
        return peft.PeftModel.from_pretrained(transformers_model(base, dtype), adapter).eval()


def saved_by_peft(architecture: str, folder: Path, *, seed: int = 0, **settings) -> peft.PeftModel:
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(transformers_model(tiny_folder(architecture)), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    with warnings.catch_warnings():  # PEFT says that it stores the whole lm_head too
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        model.save_pretrained(folder)
    return model


def change_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def refusals_of_vllm(folder: Path) -> list[str]:
    """What vLLM would refuse in an adapter, by the rules in its lora/peft_helper.py and lora/lora_model.py."""
    config = json.loads((folder / "adapter_config.json").read_text())
    refusals = [f"no {key}" for key in ("r", "lora_alpha", "target_modules") if not config.get(key)]
    refusals += [key for key in ("modules_to_save", "use_dora") if config.get(key)]
    if max(config["r"], *config["rank_pattern"].values(), 0) > 512:
        refusals.append("r")
    if config.get("bias", "none") != "none":
        refusals.append("bias")
    if not isinstance(config["target_modules"], list):
        refusals.append("target_modules is no list")
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    modules = attention | {"gate_proj", "up_proj", "down_proj", "lm_head"}
    refusals += [name for name in config["target_modules"] if name.rpartition(".")[2] not in modules]
    for key in load_file(folder / "adapter_model.safetensors"):
        prefix, *path, factor, kind = key.removeprefix("base_model.model.").split(".")
        known = [prefix, *path][-1] in modules and factor in ("lora_A", "lora_B") and kind == "weight"
        if not (key.startswith("base_model.model.") and known):
            refusals.append(key)
    return refusals


@pytest.mark.parametrize("case", CASES)
def test_our_adapter_in_peft_gives_our_logits_as_does_the_merged_model(case, tmp_path):
    architecture, config = CASES[case]
    source = tiny_folder(architecture)
    plain = plain_model(architecture)
    model = with_random_adapters(plain, config)
    save_adapter(model, tmp_path / "adapter", base_model=str(source), config=config)
    save_merged(model, source, tmp_path / "merged")

    ours = logits(model, TOKENS)
    assert np.abs(ours - logits(plain, TOKENS)).max() > 0.1
    np.testing.assert_allclose(ours, torch_logits(peft_model(source, tmp_path / "adapter"), TOKENS), rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours, logits(merge_lora(model), TOKENS), rtol=0, atol=1e-4)

    merged, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(ours, torch_logits(merged, TOKENS), rtol=0, atol=1e-4)


PLAIN = {
    "rslora": CASES["rslora"],
    "patterns": (
        "qwen2",
        LoraConfig(
            r=4, alpha=6.0, use_rslora=True, rank_pattern={"1.*q_proj": 2}, alpha_pattern={"v_proj": 3.0},
            target_modules=["q_proj", "v_proj"],
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PLAIN)
def test_plain_scaling_is_the_same_adapter_for_readers_of_lora_alpha_and_r_alone(case, tmp_path):
    architecture, config = PLAIN[case]
    model = with_random_adapters(plain_model(architecture), config)
    save_adapter(model, tmp_path, base_model="base", config=config, peft_scaling="plain")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert (written["use_rslora"], written["rank_pattern"], written["alpha_pattern"]) == (False, {}, {})
    assert {verdict.outcome for verdict in verdicts(AdapterFiles.read(tmp_path, None))} == {"acts"}
    for layer in layer_adapters(model):
        A, B = (tensors[f"base_model.model.{layer.name}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        expected = layer.scaling * layer.tensors["lora_B.weight"] @ layer.tensors["lora_A.weight"]
        # The scaling of a server that reads neither use_rslora nor the patterns.
        np.testing.assert_allclose(written["lora_alpha"] / written["r"] * B @ A, expected, rtol=1e-5, atol=1e-6)
    theirs = torch_logits(peft_model(tiny_folder(architecture), tmp_path), TOKENS)
    np.testing.assert_allclose(logits(model, TOKENS), theirs, rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        logits(load_adapter(plain_model(architecture), tmp_path), TOKENS), theirs, rtol=0, atol=1e-4
    )


def is_plain_lora(config: LoraConfig) -> bool:
    return not config.use_dora and config.trainable_token_indices is None


@pytest.mark.parametrize("case", [case for case, (_, config) in CASES.items() if is_plain_lora(config)])
def test_our_adapter_obeys_the_rules_of_vllm(case, tmp_path):
    architecture, config = CASES[case]
    save_adapter(
        with_random_adapters(plain_model(architecture), config), tmp_path / "adapter", base_model="base", config=config
    )
    assert refusals_of_vllm(tmp_path / "adapter") == []


def test_regular_expressions_and_null_become_the_shortest_list_that_names_the_same_layers(tmp_path):
    def targets(case):
        architecture, config = CASES[case]
        save_adapter(
            with_random_adapters(plain_model(architecture), config), tmp_path / case, base_model="base", config=config
        )
        return json.loads((tmp_path / case / "adapter_config.json").read_text())["target_modules"]

    every = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert targets("every_linear_layer_of_a_tied_model") == every
    assert sorted(targets("some_layers")) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.2.mlp.down_proj",
        "model.layers.2.self_attn.q_proj",
    ]
    assert "model.layers.0.self_attn.k_proj" in targets("all_but_excluded")


@pytest.mark.parametrize("case", CASES)
def test_saving_then_loading_is_the_identity(case, tmp_path):
    architecture, config = CASES[case]
    plain = plain_model(architecture)
    model = with_random_adapters(plain, config)
    save_adapter(model, tmp_path / "adapter", base_model="base", config=config)
    loaded = load_adapter(plain, tmp_path / "adapter")

    for ours, theirs in zip(layer_adapters(model), layer_adapters(loaded), strict=True):
        assert (ours.name, ours.adapter.scaling) == (theirs.name, theirs.adapter.scaling)
        names = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if config.use_dora else set())
        assert ours.tensors.keys() == theirs.tensors.keys() == (names if ours.adapter.is_target else {ROWS})
        for name, tensor in ours.tensors.items():
            np.testing.assert_array_equal(tensor, theirs.tensors[name])
    np.testing.assert_array_equal(logits(model, TOKENS), logits(loaded, TOKENS))
    read = read_adapter_config(tmp_path / "adapter")
    assert read.trainable_token_indices == config.trainable_token_indices
    for layer in (layer for layer in layer_adapters(loaded) if layer.adapter.is_target):
        theirs, asked = read.for_layer(layer.name), config.as_written().for_layer(layer.name)
        assert (theirs.r, theirs.alpha, theirs.use_rslora) == (asked.r, asked.alpha, asked.use_rslora)


def test_the_settings_are_those_of_peft(tmp_path):
    architecture, config = CASES["rslora"]
    save_adapter(
        with_random_adapters(plain_model(architecture), config),
        tmp_path / "adapter",
        base_model="org/base",
        config=config,
    )
    read = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert isinstance(read, peft.LoraConfig)
    assert (read.r, read.lora_alpha, read.use_rslora, read.base_model_name_or_path) == (4, 6, True, "org/base")
    assert isinstance(read.lora_alpha, int)
    assert (read.task_type, read.bias, read.inference_mode) == ("CAUSAL_LM", "none", True)


def test_the_revision_of_the_base_is_that_of_peft(tmp_path):
    architecture, config = CASES["rslora"]
    model = with_random_adapters(plain_model(architecture), config)
    save_adapter(model, tmp_path, base_model="org/base", revision="v1", config=config)
    read = peft.PeftConfig.from_pretrained(tmp_path)
    assert (read.base_model_name_or_path, read.revision) == ("org/base", "v1")


def test_peft_finds_the_base_and_the_tokenizer_from_another_folder(tmp_path, monkeypatch):
    architecture, config = CASES["rslora"]
    shutil.copytree(tiny_folder(architecture), tmp_path / "models" / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }} [trained]"
    model = with_random_adapters(plain_model(architecture), config)
    monkeypatch.chdir(tmp_path / "models")
    monkeypatch.setenv("SOME_TOKEN", str(tmp_path.name) + "a1b2c3d4")
    save_adapter(model, "adapter", base_model="base", config=config, tokenizer=tokenizer)
    monkeypatch.chdir("/")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "models" / "adapter")
    np.testing.assert_allclose(logits(model, TOKENS), torch_logits(found.eval(), TOKENS), rtol=0, atol=1e-4)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "models" / "adapter")
    assert read.chat_template == tokenizer.chat_template
    assert read("a b\nc")["input_ids"] == tokenizer("a b\nc")["input_ids"]


@pytest.mark.parametrize(
    "base, named",
    [
        ("org/base", "org/base"),
        ("here", "FOLDER/here"),
        ("./here/../here", "FOLDER/here/../here"),
        ("token=a1b2c3d4", "FOLDER/token=a1b2c3d4"),
        ("a1b2c3d4e5f6", "FOLDER/a1b2c3d4e5f6"),
        ("file://FOLDER/here", "FOLDER/here"),
        ("gs://bucket/base", "gs://bucket/base"),
        ("https://me:pa55word@host/base?sig=abc", "https://host/base"),
    ],
)
def test_a_base_is_named_so_that_it_is_found_from_anywhere(base, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_TOKEN", "a1b2c3d4e5f6")
    for folder in ("here", "token=a1b2c3d4", "a1b2c3d4e5f6"):
        (tmp_path / folder).mkdir()
    assert base_from_anywhere(base.replace("FOLDER", str(tmp_path))) == named.replace("FOLDER", str(tmp_path))


def test_an_adapter_can_be_written_in_another_dtype(tmp_path):
    architecture, config = CASES["rslora"]
    model = with_random_adapters(plain_model(architecture), config)
    save_adapter(model, tmp_path / "adapter", base_model="base", config=config, dtype=jnp.bfloat16)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in written.values()} == {np.dtype(jnp.bfloat16)}
    for adapter in layer_adapters(load_adapter(plain_model(architecture), tmp_path / "adapter")):
        assert {tensor.dtype for tensor in adapter.tensors.values()} == {np.dtype(np.float32)}


PEFT_CASES = {
    "tied": ("smollm2", dict(r=4, lora_alpha=8, target_modules="all-linear")),
    "untied_rslora": ("llama2", dict(r=4, lora_alpha=5.5, use_rslora=True, target_modules=["q_proj", "up_proj"])),
    "lm_head": ("qwen3", dict(r=4, lora_alpha=8, target_modules=["o_proj", "lm_head"])),
    "regex": ("mistral", dict(r=4, lora_alpha=8, target_modules=SUBSET)),
    "excluded": ("qwen2", dict(r=4, target_modules=["q_proj", "down_proj"], exclude_modules=r".*\.1\..*")),
    "some_layers": ("qwen2", dict(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2])),
    "default_targets": ("llama2", dict(r=4)),
    "rank_pattern": (
        "mistral",
        dict(
            r=4,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={r"layers\.(0|2)\.self_attn\.q_proj": 7, "q_proj": 2, "v_proj": 5},
            alpha_pattern={"1.self_attn.q_proj": 32, "down_proj": 2},
            use_rslora=True,
        ),
    ),
    "dora_of_different_ranks": (
        "qwen3",
        dict(r=4, use_dora=True, use_rslora=True, target_modules=["v_proj", "lm_head"], rank_pattern={"1.*v_proj": 2}),
    ),
    "pissa": ("qwen2", dict(r=4, init_lora_weights="pissa", target_modules=["o_proj"], rank_pattern={"1.*": 2})),
    "gaussian": ("llama2", dict(r=4, init_lora_weights="gaussian", target_modules=["k_proj"])),
    # Of an untied model, a list means the embedding alone; Gemma scales what is looked up and caps its logits.
    "rows_of_an_embedding": ("llama2", dict(r=4, trainable_token_indices=[103, 5])),
    "rows_of_both": ("qwen3", dict(r=4, trainable_token_indices={"embed_tokens": [103, 5], "lm_head": [5]})),
    "rows_of_a_scaled_tied_matrix": ("gemma2", dict(r=4, trainable_token_indices={"model.embed_tokens": [103, 5]})),
    "olora": ("mistral", dict(r=4, init_lora_weights="olora", target_modules=["q_proj"], use_rslora=True)),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_an_adapter_made_by_peft_gives_its_logits_in_our_model(case, tmp_path):
    architecture, settings = PEFT_CASES[case]
    theirs = saved_by_peft(architecture, tmp_path, **settings)
    ours = load_adapter(plain_model(architecture), tmp_path)
    np.testing.assert_allclose(logits(ours, TOKENS), torch_logits(theirs, TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("a_init", ["pissa", "olora"])
def test_an_adapter_that_peft_converted_gives_its_logits(a_init, tmp_path):
    config = peft.LoraConfig(r=4, init_lora_weights=a_init, target_modules=["v_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(transformers_model(tiny_folder("llama2")), config).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = a_init
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3)
    expected = torch_logits(theirs, TOKENS)
    with warnings.catch_warnings():  # PEFT's own advice, to do what is done here
        warnings.filterwarnings("ignore", message="(PiSSA|OLoRA) changes the base weights")
        theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    ours = load_adapter(plain_model("llama2"), tmp_path / "plain")
    np.testing.assert_allclose(logits(ours, TOKENS), expected, rtol=0, atol=1e-4)


def test_an_adapter_goes_to_peft_and_back_unchanged(tmp_path):
    architecture, settings = PEFT_CASES["lm_head"]
    saved_by_peft(architecture, tmp_path / "theirs", **settings)
    config = read_adapter_config(tmp_path / "theirs")
    model = load_adapter(plain_model(architecture), tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours", base_model="base", config=config)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert set(theirs) - set(ours) == {"base_model.model.lm_head.base_layer.weight"}
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key])


def test_a_loaded_adapter_keeps_frozen_weights_and_untargeted_layers(tmp_path):
    saved_by_peft("mistral", tmp_path, r=4, target_modules=SUBSET)
    plain = plain_model("mistral")
    for (before, names), (after, _) in zip(
        linear_layers(plain), linear_layers(load_adapter(plain, tmp_path)), strict=True
    ):
        wrapped = after.wrapped if isinstance(after, LoraLinear) else after
        assert wrapped.weight.array is before.weight.array, names
        assert isinstance(after, LoraLinear) == names[0].endswith(("q_proj", "down_proj"))


@pytest.fixture
def saved(tmp_path) -> Path:
    saved_by_peft("llama2", tmp_path, r=4, target_modules=["q_proj", "v_proj"])
    return tmp_path


A_KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B_KEY = A_KEY.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(B_KEY), f"missing: {B_KEY}"),
        (lambda t: (t.pop(A_KEY), t.pop(B_KEY)), f"missing: {A_KEY}, {B_KEY}"),
        (lambda t: t.update({A_KEY: t[A_KEY].T.copy()}), rf"{A_KEY} has shape \(32, 4\).*need \(4, 32\)"),
        (lambda t: t.update({A_KEY.replace("q_proj", "k_proj"): t[A_KEY]}), "no place: .*k_proj.lora_A"),
        (lambda t: t.update({A_KEY.replace("layers.1", "layers.7"): t[A_KEY]}), r"no place: .*layers\.7\."),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": t[A_KEY]}),
            "no place: base_model.model.lm_head.weight is not the model's",
        ),
        (lambda t: t.update({B_KEY.replace("weight", "bias"): t[A_KEY]}), "no place: .*lora_B.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_errors_that_name_them(saved, change, says):
    change_tensors(saved, change)
    with pytest.raises(ValueError, match=says) as error:
        load_adapter(plain_model("llama2"), saved)
    assert str(saved) in str(error.value)


@pytest.mark.parametrize(
    "setting",
    [
        {"peft_type": "LOHA"},
        {"task_type": "SEQ_CLS"},
        {"bias": "all"},
        {"lora_bias": True},
        {"layers_to_transform": [-1]},
        {"modules_to_save": ["lm_head"]},
        {"fan_in_fan_out": True},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": {"wte": [1]}},
        {"trainable_token_indices": [1, 1]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "loftq"},
        {"alora_invocation_tokens": [1, 2]},
        {"something_new": 1},
    ],
    ids=str,
)
def test_settings_that_compute_something_else_are_errors_that_name_them(saved, setting):
    change_config(saved, **setting)
    ((key, value),) = setting.items()
    with pytest.raises(ValueError, match=f"adapter_config.json: {key}={value!r}".replace("[", r"\[")):
        load_adapter(plain_model("llama2"), saved)


@pytest.mark.parametrize(
    "setting, says",
    [
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj=0 must be a whole number from 1"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\('=2 is the value of a key that is no regular expression"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern: q_proj='8' must be a number above 0"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern=\['q_proj'\] must be an object"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, "layers_to_transform=1 needs a list in target_mod"),
        ({"rank_pattern": {"q_proj": 2}}, r"has shape \(4, 32\); .* need \(2, 32\)"),
    ],
)
def test_patterns_of_no_sense_are_errors_that_name_them(saved, setting, says):
    change_config(saved, **setting)
    with pytest.raises(ValueError, match=says):
        load_adapter(plain_model("llama2"), saved)


def test_an_adapter_of_another_rank_than_its_config_says_is_refused(saved):
    change_config(saved, r=8)
    with pytest.raises(ValueError, match=r"has shape \(4, 32\).*need \(8, 32\)"):
        load_adapter(plain_model("llama2"), saved)


def test_an_adapter_of_a_head_trained_on_another_base_is_refused(tmp_path):
    saved_by_peft("llama2", tmp_path, r=4, target_modules=["lm_head"])
    key = "base_model.model.lm_head.base_layer.weight"
    change_tensors(tmp_path, lambda t: t.update({key: t[key] * 1.5}))
    with pytest.raises(ValueError, match="lm_head.base_layer.weight is not the model's"):
        load_adapter(plain_model("llama2"), tmp_path)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_an_adapter_of_a_head_fits_the_same_base_in_lower_precision(dtype, tmp_path):
    saved_by_peft("llama2", tmp_path, r=4, target_modules=["lm_head"])
    load_adapter(plain_model("llama2", dtype), tmp_path)
    key = "base_model.model.lm_head.base_layer.weight"
    change_tensors(tmp_path, lambda t: t.update({key: t[key].astype(dtype)}))
    load_adapter(plain_model("llama2"), tmp_path)


def test_an_adapter_of_a_tied_head_is_refused(tmp_path):
    config = LoraConfig(r=4, target_modules=["lm_head"])
    save_adapter(with_random_adapters(plain_model("llama2"), config), tmp_path / "a", base_model="base", config=config)
    with pytest.raises(ValueError, match="lm_head, which this model ties"):
        load_adapter(plain_model("smollm2"), tmp_path / "a")


def test_an_adapter_of_another_base_says_which_and_what_was_given(saved):
    change_config(saved, base_model_name_or_path="org/small")
    with pytest.raises(
        ValueError, match="made for base_model_name_or_path='org/small'; given is 'org/other', a model of"
    ):
        load_adapter(plain_model("mistral"), saved, base_model="org/other")
    with pytest.raises(ValueError, match="'org/small'; given is a model of 3 layers, hidden_size 32"):
        load_adapter(plain_model("mistral"), saved)


def test_an_adapter_that_fits_a_base_of_another_name_is_put_on_it_with_a_word(saved, caplog):
    change_config(saved, base_model_name_or_path="org/small")
    load_adapter(plain_model("llama2"), saved, base_model="/models/small")
    assert not caplog.records
    load_adapter(plain_model("llama2"), saved, base_model="org/other")
    assert "made for 'org/small' and put on 'org/other'" in caplog.text


def test_no_layers_to_transform_are_all_layers_as_for_peft(saved):
    change_config(saved, layers_to_transform=[])
    theirs = peft_model(tiny_folder("llama2"), saved)
    ours = load_adapter(plain_model("llama2"), saved)
    np.testing.assert_allclose(logits(ours, TOKENS), torch_logits(theirs, TOKENS), rtol=0, atol=1e-4)


def test_an_adapter_of_whole_numbers_is_refused(saved):
    change_tensors(saved, lambda t: t.update({A_KEY: t[A_KEY].astype(np.int32)}))
    with pytest.raises(ValueError, match=f"{A_KEY} holds I32; needed: floating-point"):
        load_adapter(plain_model("llama2"), saved)


def test_an_adapter_one_folder_down_is_found_unless_there_are_two(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "outer" / "policy")
    ours = load_adapter(plain_model("llama2"), tmp_path / "outer")
    np.testing.assert_array_equal(logits(ours, TOKENS), logits(load_adapter(plain_model("llama2"), saved), TOKENS))
    shutil.copytree(tmp_path / "outer" / "policy", tmp_path / "outer" / "reference")
    with pytest.raises(FileNotFoundError, match=r"is missing; its subfolders policy, reference hold adapters"):
        load_adapter(plain_model("llama2"), tmp_path / "outer")


def renamed_tensors(folder: Path, rename) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({rename(key): value for key, value in tensors.items()}, folder / "adapter_model.safetensors")


WRAPPED = {
    "a multimodal model": ("model.model.", "model.model.language_model."),
    "an older multimodal model": ("base_model.model.model.", "base_model.model.language_model.model."),
    "a bare AutoModel": ("model.model.", "model."),
    "the name of the adapter": (".weight", ".default.weight"),
    "another name of the adapter": (".weight", ".policy.weight"),
    "no prefix": ("base_model.model.", ""),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_names_of_another_class_mean_the_same_layers(case, saved):
    wrapped = ["model.language_model.layers.1.self_attn.q_proj", "0.self_attn.q_proj", "2.self_attn.q_proj"]
    change_config(saved, target_modules=[*wrapped, "v_proj"])
    expected = layer_adapters(load_adapter(plain_model("llama2"), saved))
    renamed_tensors(saved, lambda key: key.replace(*WRAPPED[case]))
    for mine, theirs in zip(layer_adapters(load_adapter(plain_model("llama2"), saved)), expected, strict=True):
        assert mine.name == theirs.name
        for name, tensor in theirs.tensors.items():
            np.testing.assert_array_equal(mine.tensors[name], tensor)


@pytest.mark.parametrize(
    "case", [*(case for case in WRAPPED if case != "the name of the adapter"), "targets elsewhere"]
)
def test_peft_does_nothing_with_what_is_said_to_do_nothing(case, saved):
    if case in WRAPPED:
        renamed_tensors(saved, lambda key: key.replace(*WRAPPED[case]))
    else:
        change_config(saved, target_modules=["k_proj"])
    base = tiny_folder("llama2")
    (verdict, *_) = verdicts(AdapterFiles.read(saved, base))
    assert (verdict.server, verdict.outcome) == (PEFT, "loads and does nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says which tensors are missing
        theirs = peft.PeftModel.from_pretrained(transformers_model(base), saved).eval()
    np.testing.assert_array_equal(torch_logits(theirs, TOKENS), torch_logits(transformers_model(base), TOKENS))


def test_a_regular_expression_for_a_wrapper_means_the_decoder(saved):
    change_config(saved, target_modules=r"model\.language_model\.layers\.\d+\.self_attn\.(q|v)_proj")
    load_adapter(plain_model("llama2"), saved)


def test_two_tensors_of_one_meaning_are_refused(saved):
    change_tensors(saved, lambda t: t.update({A_KEY.replace(".weight", ".default.weight"): t[A_KEY]}))
    with pytest.raises(ValueError, match=f"both .* are {A_KEY}"):
        load_adapter(plain_model("llama2"), saved)


EMBEDDING = "base_model.model.model.embed_tokens.weight"


def stored(folder: Path, architecture: str = "llama2", change=lambda t: None, **settings) -> Path:
    """An adapter beside which PEFT stored embedding and head."""
    model = peft.get_peft_model(
        transformers_model(tiny_folder(architecture)), peft.LoraConfig(r=2, target_modules=["q_proj"], **settings)
    )
    model.save_pretrained(folder, save_embedding_layers=True)
    change_tensors(folder, change)
    return folder


@pytest.mark.parametrize("architecture", ["llama2", "smollm2"])
def test_an_embedding_and_a_head_that_are_the_bases_are_left_out(architecture, tmp_path):
    stored(tmp_path, architecture)
    assert EMBEDDING in load_file(tmp_path / "adapter_model.safetensors")
    assert len(layer_adapters(load_adapter(plain_model(architecture), tmp_path))) == 3
    if architecture == "llama2":
        stored(tmp_path / "saved", architecture, modules_to_save=["embed_tokens"])
        load_adapter(plain_model(architecture), tmp_path / "saved")


def test_other_embeddings_are_refused_with_their_names_and_the_reason(tmp_path):
    stored(tmp_path / "a", change=lambda t: t.update({EMBEDDING: t[EMBEDDING] + 1}))
    with pytest.raises(ValueError, match=f"no place: {EMBEDDING} is not the model's, so the adapter was trained on"):
        load_adapter(plain_model("llama2"), tmp_path / "a")
    stored(tmp_path / "b", change=lambda t: t.update({EMBEDDING: np.pad(t[EMBEDDING], [(0, 2), (0, 0)])}))
    with pytest.raises(ValueError, match=f"{EMBEDDING} has 106 rows, and the model has 104: the voc"):
        load_adapter(plain_model("llama2"), tmp_path / "b")
    trained = EMBEDDING.replace("weight", "modules_to_save.weight")
    stored(tmp_path / "c", change=lambda t: t.update({trained: t[trained] + 1}), modules_to_save=["embed_tokens"])
    with pytest.raises(
        ValueError, match=f"modules_to_save=.* whole layers were trained.*; not as in the base: {trained}"
    ):
        load_adapter(plain_model("llama2"), tmp_path / "c")


def test_what_is_refused_names_its_tensors(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* LoRA tensor.* have invalid shape")  # PEFT 0.21: of its own biases
        peft.get_peft_model(transformers_model(tiny_folder("llama_biases")), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lora_bias=True .*: its adapters have biases.*q_proj\.lora_B\.bias"):
        read_adapter_config(tmp_path)


def test_rows_that_the_model_does_not_have_or_that_are_not_its_own_are_refused(tmp_path):
    rows = tmp_path / "rows"
    saved_by_peft("smollm2", rows, r=4, trainable_token_indices=[5, 103])
    of_head = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    ours = of_head.replace("lm_head", "model.embed_tokens")
    # As PEFT writes the rows of a tied head that was enlarged.
    change_tensors(rows, lambda t: t.update({of_head: t[ours]}))
    load_adapter(plain_model("smollm2"), rows)
    change_tensors(rows, lambda t: t.update({of_head: t[ours] + 1}))
    with pytest.raises(ValueError, match=f"{of_head} differs from {ours}, and this model's head is its embedding"):
        load_adapter(plain_model("smollm2"), rows)
    change_tensors(rows, lambda t: t.pop(of_head))
    change_config(rows, trainable_token_indices=[5, 104])
    with pytest.raises(ValueError, match=r"names 104, and model\.embed_tokens has the rows 0 to 103: .*made for"):
        load_adapter(plain_model("smollm2"), rows)
    change_config(rows, trainable_token_indices=[5])
    with pytest.raises(ValueError, match=rf"{ours} has shape \(2, 32\)"):
        load_adapter(plain_model("smollm2"), rows)


def test_an_adapter_is_written_with_the_rows_that_its_settings_name(tmp_path):
    architecture, config = CASES["token_rows"]
    model = with_random_adapters(plain_model(architecture), config)
    with pytest.raises(ValueError, match=r"trains rows of {'embed_tokens': \(103, 5, 9\)}, but .* names {}"):
        save_adapter(model, tmp_path, base_model="base", config=LoraConfig(r=4, target_modules=["q_proj"]))


def test_settings_of_eva_do_not_matter(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: eva without data
        theirs = peft.get_peft_model(transformers_model(tiny_folder("llama2")), config).eval()
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["eva_config"]
    load_adapter(plain_model("llama2"), tmp_path)


def test_a_model_in_the_place_of_an_adapter_says_where_it_belongs():
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing; .* give it as initialize_from_hf"):
        read_adapter_config(tiny_folder("llama2"))


def test_a_model_with_adapters_takes_no_second_ones(saved):
    once = load_adapter(plain_model("llama2"), saved)
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(once, saved)


def test_saving_needs_the_settings_of_the_adapters(tmp_path):
    config = LoraConfig(r=4, alpha=8.0)
    model = with_random_adapters(plain_model("llama2"), config)
    with pytest.raises(ValueError, match="lora.use_rslora=True"):
        save_adapter(model, tmp_path / "a", base_model="base", config=LoraConfig(r=4, alpha=8.0, use_rslora=True))
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(plain_model("llama2"), tmp_path / "a", base_model="base", config=config)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_an_adapter_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        load_adapter(plain_model("llama2"), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"no other format.*adapter_model\.bin"):
        load_adapter(plain_model("llama2"), tmp_path)
