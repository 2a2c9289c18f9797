"""MXFP4 is read as transformers reads it: its values, on any devices, in few bits, and as bfloat16 in an export."""

import functools
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from haliax.partitioning import set_mesh
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file
from tiny_models import load, logits, random_tokens, tiny_folder, torch_logits, with_random_adapters
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lora_dpo_jax.huggingface.mxfp4 import decoded, unpacked
from lora_dpo_jax.huggingface.tensors import TensorFiles
from lora_dpo_jax.huggingface.weights import read_config, save_merged
from lora_dpo_jax.lora import LoraConfig, linear_layers

LORA = LoraConfig(
    r=3, alpha=6.0, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
)
TOKENS = random_tokens(1, 12)
METHOD = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def random_packed(rng: np.random.Generator, *shape: int, least: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and scales of random bytes; `shape` is (..., out, in)."""
    *outer, inputs = shape
    blocks = rng.integers(0, 256, (*outer, inputs // 32, 16), dtype=np.uint8)
    return blocks, rng.integers(least, most, blocks.shape[:-1], dtype=np.uint8)


@functools.cache
def packed_folder() -> Path:
    """A tiny gpt-oss as its files are on the hub: bfloat16, with the matrices of experts in MXFP4."""
    folder = tiny_folder("gpt_oss").parent / "gpt_oss_mxfp4"
    shutil.copytree(tiny_folder("gpt_oss"), folder)
    config = json.loads((folder / "config.json").read_text())
    # Inputs of a whole number of groups.
    sizes = {"intermediate_size": 64, "quantization_config": METHOD, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | sizes))
    rng, tensors = np.random.default_rng(0), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            out, inputs = (128, 32) if "gate_up" in name else (32, 64)
            blocks, scales = random_packed(rng, 4, out, inputs, least=121, most=125)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            wider = name.endswith("gate_up_proj_bias")
            tensor = rng.normal(size=(4, 128)).astype(np.float32) if wider else tensor
            tensors[name] = tensor.astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def theirs(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the weights are dequantized
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


@pytest.mark.parametrize("least, most", [(100, 150), (0, 9), (240, 253)])
def test_values_are_those_of_transformers(least, most):
    blocks, scales = random_packed(np.random.default_rng(1), 3, 8, 64, least=least, most=most)
    found = decoded(blocks, scales).swapaxes(-1, -2)
    expected = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).float().numpy()
    assert found.dtype == ml_dtypes.bfloat16 and np.isfinite(expected).all()
    np.testing.assert_array_equal(found.astype(np.float32), expected)


def test_parts_are_parts_of_the_whole():
    files = unpacked(TensorFiles(packed_folder()))
    assert not [name for name in files.names if name.endswith(("_blocks", "_scales"))]
    view = files.view("model.layers.1.mlp.experts.down_proj")
    whole = view[()]
    assert view.info.shape == whole.shape == (4, 64, 32)
    for index in [(slice(1, 3),), (slice(2, 3), slice(5, 41)), (slice(None), slice(33, 64), slice(7, 9))]:
        np.testing.assert_array_equal(view[index], whole[index])


def test_logits_are_those_of_transformers():
    assert read_config(packed_folder()).experts is not None
    ours = logits(load(packed_folder()), TOKENS)
    np.testing.assert_allclose(ours, torch_logits(theirs(packed_folder()), TOKENS), rtol=0, atol=1e-4)


def test_each_device_reads_its_part():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    with set_mesh(mesh):
        found = load(packed_folder(), mapping={"embed": "data", "mlp": "model", "kv_head": "model"})
    for mine, expected in zip(jax.tree.leaves(found), jax.tree.leaves(load(packed_folder())), strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_matrices_of_all_experts_are_held_in_few_bits():
    model, plain = load(packed_folder(), quantization="nf4"), load(packed_folder())
    held, weights = (
        {names[0]: layer.weight.astype(jnp.float32) for layer, names in linear_layers(of) if "experts" in names[0]}
        for of in (model, plain)
    )
    assert len(held) == 2 * 3 and "model.layers.0.mlp.experts.gate_up_proj" in held
    for name, weight in weights.items():
        error = np.linalg.norm((held[name] - weight).array) / np.linalg.norm(weight.array)
        assert 1e-3 < error < 0.15, name
        of_stack = np.asarray({names[0]: layer for layer, names in linear_layers(model)}[name].weight.error.array)
        np.testing.assert_allclose(np.sqrt(np.mean(of_stack**2)), error, rtol=0.1)


def test_a_merged_export_is_bfloat16_under_the_names_of_transformers(tmp_path, caplog):
    model = with_random_adapters(load(packed_folder()), LORA)
    save_merged(model, packed_folder(), tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert tensors["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 32, 128)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        merged, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged", output_loading_info=True, dtype="float32"
        )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")) and not caplog.records
    # The merged matrices are rounded to bfloat16: ours are read again.
    ours = logits(load(tmp_path / "merged"), TOKENS)
    np.testing.assert_allclose(ours, torch_logits(merged.eval(), TOKENS), rtol=0, atol=1e-4)
    assert np.abs(ours - logits(model, TOKENS)).max() < 0.05 * np.abs(ours).max()


def test_blocks_and_scales_that_do_not_fit_are_an_error_that_names_them(tmp_path):
    tensors = load_file(packed_folder() / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    save_file(tensors | {name: tensors[name][:, :, :1]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"_blocks is U8 \(4, 32, 2, 16\) and .*down_proj_scales is U8 \(4, 32, 1\)"):
        unpacked(TensorFiles(tmp_path))


def test_other_quantizations_of_gpt_oss_are_refused(tmp_path):
    shutil.copytree(packed_folder(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantization_config=.*gptq"):
        read_config(tmp_path / "model")
