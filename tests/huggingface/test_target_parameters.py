"""Adapters of the parameters that hold the matrices of all experts are PEFT's: read, written, merged and trained."""

import dataclasses
import functools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tiny_models import load, logits, random_tokens, tiny_folder, torch_logits, with_random_adapters
from tiny_runs import plain_rows, run_config, training_metrics, write_rows

from lora_dpo_jax.huggingface.adapter_config import read_adapter_config
from lora_dpo_jax.huggingface.adapters import layer_adapters, load_adapter, save_adapter
from lora_dpo_jax.huggingface.weights import read_config, save_merged
from lora_dpo_jax.lora import LoraConfig, loraize, merge_lora, trainable_filter
from lora_dpo_jax.main import generate, train
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.runs.assembly import placement_of
from lora_dpo_jax.runs.base import load_base, load_policy, load_tokenizer, lora_config

# transformers has given it another name, and PEFT 0.21 looks for the patterns of parameters among modules alone.
RENAMED = "`is_gradient_checkpointing` is deprecated"
OF_PARAMETERS = "The following (rank|alpha)_pattern keys did not match any targeted module"
pytestmark = [
    pytest.mark.usefixtures("two_devices"),
    pytest.mark.filterwarnings(f"ignore:{RENAMED}:FutureWarning"),
    pytest.mark.filterwarnings(f"ignore:{OF_PARAMETERS}:RuntimeWarning"),
]

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LORA = LoraConfig(r=3, alpha=6.0, target_modules=["q_proj"], target_parameters=PARAMETERS)
TOKENS = random_tokens(1, 12)
FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"]


@functools.cache
def gathered(family: str) -> CausalLM:
    return load(tiny_folder(family), lora=LORA)


@functools.cache
def adapted(family: str) -> CausalLM:
    return with_random_adapters(gathered(family), LORA)


def base(family: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_folder(family), dtype="float32").eval()


def in_peft(family: str, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=RENAMED)
        warnings.filterwarnings("ignore", message=OF_PARAMETERS)
        return peft.PeftModel.from_pretrained(base(family), folder).eval()


def made_by_peft(family: str, folder: Path, **settings: Any) -> Any:
    """A random adapter, saved by PEFT."""
    options = dict(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=PARAMETERS, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = peft.get_peft_model(base(family), peft.LoraConfig(**options | settings, init_lora_weights=False)).eval()
    model.save_pretrained(folder)
    return model


def assert_close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_parameters_are_the_same_in_peft_both_ways_and_merged(family, tmp_path):
    ours = logits(adapted(family), TOKENS)
    assert np.abs(ours - torch_logits(base(family), TOKENS)).max() > 0.05
    save_adapter(adapted(family), tmp_path / "ours", base_model=str(tiny_folder(family)), config=LORA)
    assert_close(ours, torch_logits(in_peft(family, tmp_path / "ours"), TOKENS))

    save_merged(adapted(family), tiny_folder(family), tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder(family), tmp_path / "merged"))
    assert {name: array.shape for name, array in before.items()} == {name: x.shape for name, x in after.items()}
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32").eval()
    assert_close(ours, torch_logits(merged, TOKENS))

    made = made_by_peft(family, tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: x.shape for key, x in theirs.items()}
    found = load_adapter(gathered(family), tmp_path / "theirs")
    assert_close(logits(found, TOKENS), torch_logits(made, TOKENS))


def test_saving_then_loading_is_the_identity(tmp_path):
    save_adapter(adapted("gpt_oss"), tmp_path, base_model="base", config=LORA)
    found = load_adapter(gathered("gpt_oss"), tmp_path)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(adapted("gpt_oss")), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert read_adapter_config(tmp_path) == LORA


@pytest.mark.parametrize(
    "settings, rank",
    [
        (dict(target_parameters=PARAMETERS[:1]), 3),
        (dict(target_parameters=PARAMETERS[1:], target_modules=[], use_rslora=True), 3),
        (dict(rank_pattern={"gate_up_proj": 5, r"layers.1.mlp.experts.down_proj": 2}, alpha_pattern={"q_proj": 1}), 5),
    ],
    ids=["gate_up_proj alone", "down_proj alone", "patterns"],
)
def test_some_parameters_and_ranks_by_layer_are_read_and_written_as_in_peft(settings, rank, tmp_path):
    """The adapter of the last target is the outer wrapper, whichever that is."""
    made = made_by_peft("qwen3_moe", tmp_path / "theirs", **settings)
    found = load_adapter(gathered("qwen3_moe"), tmp_path / "theirs")
    assert_close(logits(found, TOKENS), torch_logits(made, TOKENS))
    config = read_adapter_config(tmp_path / "theirs")
    save_adapter(found, tmp_path / "ours", base_model="base", config=config)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and max(len(tensor) for tensor in ours.values()) >= 6 * rank
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)
    assert_close(torch_logits(in_peft("qwen3_moe", tmp_path / "ours"), TOKENS), torch_logits(made, TOKENS))


def test_peft_writes_an_adapter_of_each_matrix_as_one_of_parameters_at_twice_the_rank(tmp_path):
    """And it is read as the same."""
    config = LoraConfig(r=2, alpha=4.0)
    apart = with_random_adapters(load(tiny_folder("mixtral")), config)
    save_adapter(apart, tmp_path / "apart", base_model=str(tiny_folder("mixtral")), config=config)
    made = in_peft("mixtral", tmp_path / "apart")
    made.save_pretrained(tmp_path / "doubled")
    lora = read_adapter_config(tmp_path / "doubled")
    assert sorted(lora.target_parameters or []) == ["down_proj", "gate_up_proj"]
    found = load_adapter(load(tiny_folder("mixtral"), lora=lora), tmp_path / "doubled")
    assert_close(logits(found, TOKENS), torch_logits(made, TOKENS))
    held = load_file(tmp_path / "doubled" / "adapter_model.safetensors")
    assert held["base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"].shape == (4 * 2 * 2, 32)


def test_experts_trained_with_dropout_load_in_peft(tmp_path):
    """PEFT makes parameters of them, for which it refuses lora_dropout."""
    config = LoraConfig(r=2, alpha=4.0, dropout=0.1)
    model = loraize(load(tiny_folder("mixtral")), config, key=jax.random.key(0))
    save_adapter(model, tmp_path, base_model="base", config=config)
    in_peft("mixtral", tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"lora_dropout": 0.1}))
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        in_peft("mixtral", tmp_path)


def test_two_steps_of_training_are_those_of_peft(tmp_path):
    """By gradient descent on the squares of logits, from PEFT's adapter."""
    made = made_by_peft("gpt_oss", tmp_path / "start")
    model = load_adapter(gathered("gpt_oss"), tmp_path / "start")

    @eqx.filter_jit
    def step(model: CausalLM) -> CausalLM:
        adapters, weights = eqx.partition(model, trainable_filter(model))
        gradients = jax.grad(lambda adapters: jnp.mean(logits(eqx.combine(adapters, weights), TOKENS) ** 2))(adapters)
        return eqx.combine(jax.tree.map(lambda x, g: x - 0.1 * g, adapters, gradients), weights)

    factors = [parameter for name, parameter in made.named_parameters() if "lora_" in name]
    for parameter in factors:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(factors, lr=0.1)
    for _ in range(2):
        model = step(model)
        optimizer.zero_grad()
        made(input_ids=torch.tensor(TOKENS, dtype=torch.long), use_cache=False).logits.square().mean().backward()
        optimizer.step()
    made.save_pretrained(tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours", base_model="base", config=LORA)
    start, ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("start", "ours", "theirs")
    )
    for key, tensor in theirs.items():
        np.testing.assert_allclose(ours[key], tensor, rtol=0, atol=1e-5)
    assert all(np.abs(theirs[key] - start[key]).max() > 1e-3 for key in theirs)


def test_new_adapters_of_ranks_by_layer_start_at_zero_and_are_written_with_plain_scaling_and_merged(tmp_path):
    ranks = {"layers.1.mlp.experts.gate_up_proj": 2, "down_proj": 2}
    config = dataclasses.replace(LORA, use_rslora=True, rank_pattern=ranks)
    model = with_random_adapters(gathered("qwen3_moe"), config)
    _, weights = eqx.partition(model, trainable_filter(model))
    new, _ = eqx.partition(loraize(gathered("qwen3_moe"), config, key=jax.random.key(0)), trainable_filter(model))
    plain = torch_logits(base("qwen3_moe"), TOKENS)
    assert_close(logits(eqx.combine(new, weights), TOKENS), plain)
    ours = logits(model, TOKENS)
    assert np.abs(ours - plain).max() > 0.05
    save_adapter(model, tmp_path / "plain", base_model="base", config=config, peft_scaling="plain")
    assert_close(ours, torch_logits(in_peft("qwen3_moe", tmp_path / "plain"), TOKENS))
    written = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (written["r"], written["rank_pattern"], written["use_rslora"]) == (3, {}, False)
    assert_close(logits(merge_lora(model), TOKENS), ours)


@pytest.mark.parametrize(
    "settings, named",
    [({"dropout": 0.1}, "lora.dropout"), ({"use_dora": True}, "use_dora"), ({"a_init": "pissa"}, "a_init=pissa")],
)
def test_what_peft_has_not_for_parameters_is_refused(settings, named):
    with pytest.raises(ValueError, match=f"lora.target_parameters=.* cannot have .*{named}"):
        LoraConfig(target_parameters=PARAMETERS, **settings)
    theirs = {"dropout": "lora_dropout", "a_init": "init_lora_weights"}
    options = {theirs.get(key, key): value for key, value in settings.items()}
    model = base("gpt_oss")
    with pytest.raises((ValueError, AttributeError)):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=[], target_parameters=PARAMETERS, **options))


def test_parameters_that_are_not_there_are_errors_that_name_those_that_are(tmp_path):
    with pytest.raises(ValueError, match=r"experts.up_proj matches no parameter.*mlp.experts.gate_up_proj"):
        loraize(
            gathered("gpt_oss"),
            LoraConfig(target_parameters=["experts.up_proj"], target_modules=[]),
            key=jax.random.key(0),
        )
    with pytest.raises(ValueError, match=r"lora.target_modules.*for lora.target_parameters: .*mlp.experts.down_proj"):
        loraize(gathered("gpt_oss"), LoraConfig(target_modules=["down_proj"]), key=jax.random.key(0))
    with pytest.raises(ValueError, match="lora.target_parameters=.* has no experts"):
        read_config(tiny_folder("llama2"), LORA)
    save_adapter(adapted("mixtral"), tmp_path, base_model="base", config=LORA)
    with pytest.raises(ValueError, match=r"names no parameter of the model; each matrix of its experts is apart"):
        load_adapter(load(tiny_folder("mixtral")), tmp_path)


def test_a_run_trains_parameters_of_experts_and_the_commands_read_its_export(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", plain_rows(4))
    settings = dict(initialize_from_hf=str(tiny_folder("mixtral")), optimizer={"learning_rate": 1e-2})
    lora = {"r": 2, "target_modules": ["q_proj"], "target_parameters": PARAMETERS}
    config = run_config(tmp_path, rows, **settings, lora=lora, peft_save_path=str(tmp_path / "first"))
    train.main(config)
    assert training_metrics(config)[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    tensors = load_file(tmp_path / "first" / "adapter_model.safetensors")
    trained = [key for key, tensor in tensors.items() if "lora_B" in key and tensor.any()]
    assert sum(".experts." in key for key in trained) == 2 * 3 and len(trained) == 3 * 3

    config = dataclasses.replace(config, initialize_from_peft=str(tmp_path / "first"))
    placement = placement_of(config)
    base = load_base(config, load_tokenizer(config), placement)
    policy = load_policy(config, lora_config(config), base, placement, key=jax.random.key(0))
    assert [adapter.rank for adapter in layer_adapters(policy)] == [2] * 3 * 3
    model = dict(model=str(tiny_folder("mixtral")), adapter=str(tmp_path / "first"))
    assert generate.main(generate.GenerateConfig(**model, prompts=["a"], chat=False, max_new_tokens=1))
