"""A file is the former one or the new one, never a part of either."""

import pytest
from tiny_disks import no_file_larger_than

from lora_dpo_jax.files import replace_file


def test_a_file_is_replaced_and_keeps_its_mode(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"first")
    path.chmod(0o640)
    replace_file(path, b"second")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"second", 0o640)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_former_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"former")
    with no_file_larger_than(1000), pytest.raises(OSError):
        replace_file(path, bytes(2000))
    assert path.read_bytes() == b"former" and [each.name for each in tmp_path.iterdir()] == ["file"]
