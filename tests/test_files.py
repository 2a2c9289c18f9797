"""A file or a folder is the former one or the new one, never a part of either."""

import hashlib
import os
import time
import zlib

import pytest
from etils import epath
from tiny_disks import no_file_larger_than

from lora_dpo_jax import files
from lora_dpo_jax.files import cache_folder, new_folder, replace_file, sha256_of, size_and_crc32


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_keeps_its_mode(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"first")
    path.chmod(0o640)
    replace_file(path, b"second")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"second", 0o640)
    assert names_in(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_former_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"former")
    with no_file_larger_than(1000), pytest.raises(OSError):
        replace_file(path, bytes(2000))
    assert path.read_bytes() == b"former" and names_in(tmp_path) == ["file"]


def test_a_folder_has_its_name_only_when_it_is_whole(tmp_path):
    target = tmp_path / "above" / "folder"
    with new_folder(target) as folder:
        (folder / "file").write_text("whole")
        assert not target.exists()
    assert (target / "file").read_text() == "whole" and names_in(target.parent) == ["folder"]


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("a part")
        raise KeyError("no more")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("is_whole", [True, False])
def test_the_folder_of_a_faster_process_stays_if_it_is_whole(tmp_path, is_whole):
    target = tmp_path / "folder"
    with new_folder(target, is_whole=lambda found: (found / "end").exists()) as folder:
        (folder / "from").write_text("slower")
        target.mkdir()
        (target / "from").write_text("faster")
        if is_whole:
            (target / "end").touch()
    assert (target / "from").read_text() == ("faster" if is_whole else "slower")
    assert names_in(tmp_path) == ["folder"]


def test_a_file_of_the_same_name_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(OSError), new_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "folder").read_text() == "a file" and names_in(tmp_path) == ["folder"]


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path):
    now, day = time.time(), 24 * 3600
    for name, age in {"killed": day + 60, "writing": day - 60}.items():
        file = tmp_path / f".building-{name}" / "deeper" / "file"
        file.parent.mkdir(parents=True)
        file.write_text("a part")
        # Of the one that writes, only the file is new.
        for path in (file, file.parent, file.parent.parent):
            os.utime(path, (now - (age if path == file else 2 * day),) * 2)
    with new_folder(tmp_path / "folder"):
        pass
    assert names_in(tmp_path) == [".building-writing", "folder"]


@pytest.mark.parametrize("size", [0, 1, 5, 8, 17])
def test_checksums_are_those_of_the_whole_file(tmp_path, monkeypatch, size):
    monkeypatch.setattr(files, "BLOCK_BYTES", 4)
    path, content = tmp_path / "file", bytes(range(size))
    path.write_bytes(content)
    assert size_and_crc32(path) == size_and_crc32(epath.Path(path)) == (size, zlib.crc32(content))
    with path.open("rb") as file:
        assert sha256_of(file) == hashlib.sha256(content).hexdigest()


def test_a_setting_or_the_environment_names_the_folder_of_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("LORA_DPO_JAX_CACHE", raising=False)
    assert cache_folder() == tmp_path / "user" / "lora_dpo_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "lora_dpo_jax"
    monkeypatch.setenv("LORA_DPO_JAX_CACHE", "~/other")
    assert cache_folder() == tmp_path / "other"
    assert cache_folder("~/set") == tmp_path / "set"
