"""Whatever files of a model or an adapter hold, reading ends right, or in a line that names the file and the key."""

import json
import random
from typing import Any

import numpy as np
import peft
import pytest
import transformers
from hostile_values import hostile_values, how_it_ends
from safetensors.numpy import save_file
from tiny_models import ARCHITECTURES, FAMILIES, load, tiny_folder, tiny_tokenizer, with_random_adapters

from lora_dpo_jax.generation import encode_prompt, read_stop_ids
from lora_dpo_jax.huggingface.adapter_config import read_base_model
from lora_dpo_jax.huggingface.adapters import load_adapter, save_adapter
from lora_dpo_jax.huggingface.tensors import TensorFiles
from lora_dpo_jax.huggingface.tokenizers import read_tokenizer
from lora_dpo_jax.lora import LoraConfig
from lora_dpo_jax.models import config_from_hf

LORA = LoraConfig(r=4, alpha=8.0, target_modules=["q_proj", "v_proj"])
# Of each architecture, all that its config class knows, what transformers 4 wrote, and a key of each kind besides.
BESIDE = {
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 1.0,
    "rope_theta": 500.0,
    "torch_dtype": "bfloat16",
    "is_causal": True,
    "quantization_config": None,
    "attn_logit_softcapping": None,
    "temperature": 0.6,
    "unsloth_fixed": True,
}


def ends(key: str, value: Any, file: str, function) -> bool:
    """Whether it ended right; fails if it ended neither so nor in a line that names the key and the file."""
    line = how_it_ends(function)
    assert line is None or (file in line and key in line), f"{key}: {value!r} ended in {line}"
    return line is None


def parsed(values: Any) -> Any:
    return json.loads(json.dumps(values))


def config_of(architecture: str) -> dict[str, Any]:
    return json.loads((ARCHITECTURES | FAMILIES)[architecture].to_json_string(use_diff=False)) | BESIDE


@pytest.mark.parametrize(
    "architecture",
    [
        "llama3.1",
        "mistral",
        "qwen2_window",
        "qwen3",
        "smollm3",
        "olmo3",
        "gemma2",
        "gemma3_text",
        "granite",
        "cohere2",
        "qwen3_moe",
    ],
)
def test_any_value_of_any_key_of_config_json(architecture):
    config = config_of(architecture)
    assert ends("", config, "", lambda: config_from_hf(parsed(config)))
    ended_right = tried = 0
    for key, right in config.items():
        for value in hostile_values(right):
            changed = parsed(config | {key: value})
            ended_right += ends(key, value, "config.json", lambda changed=changed: config_from_hf(changed))
            tried += 1
    assert tried > 1500 and 0 < ended_right < tried


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn", "longrope"])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_any_value_of_any_key_of_the_rotary_settings(kind, name):
    rope = {"rope_type": kind, "type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 16, "rope_theta": 500.0, "partial_rotary_factor": 1.0}
    rope |= {"beta_fast": 32.0, "mscale": 1.0, "truncate": True} if kind == "yarn" else {}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    config = config_of("llama2") | {name: rope}
    assert ends("", config, "", lambda: config_from_hf(parsed(config)))
    for key, right in rope.items():
        for value in hostile_values(right):
            changed = parsed(config | {name: rope | {key: value}})
            ends(name, value, "config.json", lambda changed=changed: config_from_hf(changed))
        changed = parsed(config | {name: {known: value for known, value in rope.items() if known != key}})
        ends(name, "absent", "config.json", lambda changed=changed: config_from_hf(changed))


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "head_dim"])
@pytest.mark.parametrize("factor", [2, 2**25])
def test_a_size_that_the_weights_do_not_have_ends_in_a_line(key, factor, tmp_path):
    folder = tiny_folder("qwen3")
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {key: config[key] * factor, "layer_types": None}))
    line = how_it_ends(lambda: load(tmp_path))
    assert line is not None and str(tmp_path) in line


def test_any_value_of_any_key_of_adapter_config_json(tmp_path):
    plain = load(tiny_folder("llama2"))
    save_adapter(with_random_adapters(plain, LORA), tmp_path, base_model="base", config=LORA)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    settings = {**json.loads(json.dumps(peft.LoraConfig().to_dict(), default=list)), **written}

    def read() -> None:
        load_adapter(plain, tmp_path, base_model="base")
        read_base_model(tmp_path)

    tried = 0
    for key, right in settings.items():
        for value in hostile_values(right, more=2):
            (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {key: value}))
            ends(key, value, "adapter_config.json", read)
            tried += 1
    assert tried > 1500


def test_any_value_of_any_key_of_generation_config_json(tmp_path):
    settings = transformers.GenerationConfig(bos_token_id=1, eos_token_id=[2, 3]).to_dict()
    for key, right in settings.items():
        for value in hostile_values(right, more=2) if key == "eos_token_id" else [None, -1, "x", [], {}]:
            (tmp_path / "generation_config.json").write_text(json.dumps(settings | {key: value}))
            ends(key, value, "generation_config.json", lambda: np.array(sorted(read_stop_ids(tmp_path)), np.int32))


def test_any_value_of_an_index(tmp_path):
    name, file = "model.norm.weight", "model-00001-of-00001.safetensors"
    save_file({name: np.ones(3, np.float32)}, tmp_path / file)
    index = {"metadata": {"total_size": 12}, "weight_map": {name: file}}
    for key, value in (
        *(("metadata", value) for value in hostile_values(index["metadata"])),
        *(("weight_map", value) for value in hostile_values(index["weight_map"])),
        *(("weight_map", {name: value}) for value in hostile_values(file)),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index | {key: value}))
        line = how_it_ends(lambda: [TensorFiles(tmp_path).read(name) for name in TensorFiles(tmp_path).names])
        # A name of no file, or of a tensor that its file does not have, is named itself.
        assert line is None or (str(tmp_path) in line), f"{value!r} ended in {line}"


HEADERS = {
    "no bytes": b"",
    "half a length": b"\x08\x00",
    "a length beyond the file": (2**20).to_bytes(8, "little") + b"{}",
    "a length beyond memory": (2**63).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"nope",
    "a list": (2).to_bytes(8, "little") + b"[]",
}
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ENTRIES = {
    "an unknown dtype": ENTRY | {"dtype": "F99"},
    "no dtype": ENTRY | {"dtype": None},
    "offsets beyond the file": ENTRY | {"data_offsets": [0, 2**40]},
    "offsets before the file": ENTRY | {"data_offsets": [-8, 0]},
    "offsets that cross": ENTRY | {"data_offsets": [8, 0]},
    "another size than its shape's": ENTRY | {"shape": [3]},
    "a negative size": ENTRY | {"shape": [-2]},
    "a size that overflows": ENTRY | {"shape": [2**62, 2**62]},
    "a size that is text": ENTRY | {"shape": ["2"]},
    "null": None,
}


def safetensors_file(entry: Any) -> bytes:
    header = json.dumps({"model.norm.weight": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(8)


@pytest.mark.parametrize(
    "content", [*HEADERS.values(), *map(safetensors_file, ENTRIES.values())], ids=[*HEADERS, *ENTRIES]
)
def test_a_damaged_safetensors_header_is_named(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    line = how_it_ends(lambda: [TensorFiles(tmp_path).read(name) for name in TensorFiles(tmp_path).names])
    assert line is not None and str(tmp_path / "model.safetensors") in line


def test_a_safetensors_file_with_a_byte_changed_ends_right_or_in_a_line(tmp_path):
    path, rng = tmp_path / "model.safetensors", random.Random(0)
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(header_bytes)] = rng.randrange(256)
        path.write_bytes(damaged)
        line = how_it_ends(lambda: [TensorFiles(tmp_path).read(name) for name in TensorFiles(tmp_path).names])
        assert line is None or str(path) in line


def test_any_value_of_any_key_of_tokenizer_config_json(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "chat_template": "{{ messages[0].content }}",
        "padding_side": "right",
        "add_bos_token": False,
        "added_tokens_decoder": {"3": {"content": "<|im_start|>", "special": True}},
        "additional_special_tokens": ["<|im_start|>"],
    }

    def use() -> None:
        tokenizer = read_tokenizer(tmp_path)
        encode_prompt(tokenizer, "hello")
        tokenizer.decode([5, 6], skip_special_tokens=True)

    for key, right in settings.items():
        for value in hostile_values(right, more=1):
            path.write_text(json.dumps(settings | {key: value}))
            ends(key, value, path.name, use)


def test_any_value_of_any_key_of_tokenizer_json_ends_right_or_names_the_file(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text())
    for key, right in settings.items():
        for value in hostile_values(right, more=1)[:60]:
            path.write_text(json.dumps(settings | {key: value}))
            ends("", value, path.name, lambda: read_tokenizer(tmp_path))
