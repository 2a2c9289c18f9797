"""A digest follows the contents of a file, which is read once."""

import json
import os
import time

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import tiny_folder

from lora_dpo_jax.huggingface import digests
from lora_dpo_jax.huggingface.digests import CHUNK_BYTES, file_digest, tensor_digests


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the files that are read through."""
    names, read = [], digests._digest
    monkeypatch.setattr(digests, "_digest", lambda path: names.append(path.name) or read(path))
    return names


def write(path, content: bytes, seconds_ago: float = 60.0):
    path.write_bytes(content)
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


def test_a_digest_is_that_of_every_byte(tmp_path):
    content = bytearray(np.random.default_rng(0).bytes(CHUNK_BYTES + 1000))
    found = {file_digest(write(tmp_path / "whole", bytes(content)), memory=tmp_path / "memory")}
    for index in (0, CHUNK_BYTES - 1, CHUNK_BYTES, len(content) - 1):
        content[index] ^= 1
        found.add(file_digest(write(tmp_path / f"flipped{index}", bytes(content)), memory=tmp_path / "memory"))
        content[index] ^= 1
    found.add(file_digest(write(tmp_path / "short", bytes(content[:-1])), memory=tmp_path / "memory"))
    assert len(found) == 6
    same = file_digest(write(tmp_path / "same", bytes(content)), memory=tmp_path / "memory")
    assert same in found, "the path is not part of it"


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path, reads):
    path, memory = write(tmp_path / "file", b"abc"), tmp_path / "memory"
    first = file_digest(path, memory=memory)
    assert [file_digest(path, memory=memory) for _ in range(3)] == [first] * 3
    assert reads == ["file"]
    assert file_digest(write(path, b"abd", seconds_ago=50), memory=memory) != first
    assert reads == ["file"] * 2


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, reads):
    path, memory = write(tmp_path / "file", b"abc", seconds_ago=0), tmp_path / "memory"
    first = file_digest(path, memory=memory)
    assert file_digest(path, memory=memory) == first
    assert reads == ["file"] * 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"file": 3}', b"\xff"])
def test_what_is_remembered_wrongly_is_read_again(tmp_path, reads, damage):
    path, memory = write(tmp_path / "file", b"abc"), tmp_path / "memory"
    first = file_digest(path, memory=memory)
    (remembered,) = memory.iterdir()
    remembered.write_bytes(damage)
    assert file_digest(path, memory=memory) == first
    assert reads == ["file"] * 2


def test_all_files_of_a_model_count_and_no_other(tmp_path, reads):
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("1", "2", "unused"):
        save_file({"a": np.zeros(3)}, tmp_path / f"{name}.safetensors")
    found = tensor_digests(tmp_path, memory=tmp_path / "memory")
    assert list(found) == reads == ["model.safetensors.index.json", "1.safetensors", "2.safetensors"]
    assert list(tensor_digests(tiny_folder("llama2"), memory=tmp_path / "memory")) == ["model.safetensors"]
