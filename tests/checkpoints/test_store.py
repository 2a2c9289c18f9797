"""Checkpoints hold what was saved, those stay that should, and only a whole one of the same run is gone on from."""

import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from lora_dpo_jax.checkpoints import arrays as checkpoint_arrays
from lora_dpo_jax.checkpoints import clock as checkpoint_clock
from lora_dpo_jax.checkpoints.config import CheckpointerConfig, CheckpointInterval
from lora_dpo_jax.checkpoints.files import DESCRIPTION, UNCHECKED, check_files, read_description
from lora_dpo_jax.checkpoints.store import Checkpoints

IDENTITY = {"lora": {"r": 4, "target_modules": None}, "data": {"pairs": 12}}
SETTINGS = {"optimizer": {"learning_rate": 1e-4}}


def state(seed: int) -> dict[str, Any]:
    """As a run's: some adapters in two dtypes, an optimizer's tuple, a counter."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "step": jnp.asarray(seed, jnp.int32),
        "adapters": {"a": jax.random.normal(keys[0], (8, 3)), "b": jax.random.normal(keys[1], (4,), jnp.bfloat16)},
        "optimizer": (jax.random.normal(keys[2], (8, 3)), jnp.asarray(seed, jnp.int32)),
    }


def checkpoints(folder: Path, *, identity=IDENTITY, settings=SETTINGS, **config) -> Checkpoints:
    return Checkpoints(epath.Path(folder), CheckpointerConfig(**config), identity=identity, settings=settings)


def save(folder: Path, *steps: int, last: int | None = None, **kwargs) -> None:
    with checkpoints(folder, **kwargs) as run:
        for step in steps:
            run.save(step, state(step), notes={"of": step}, is_last=step == last)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def assert_same_bits(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_a_run_keeps_besides_is_restored_where_it_is_wanted(tmp_path):
    kept, other = {"a": jnp.arange(6.0).reshape(2, 3)}, {"a": jnp.zeros((3, 2))}
    for folder, tree in (("with", kept), ("without", None)):
        with checkpoints(tmp_path / folder) as run:
            run.save(3, state(3), notes={}, kept=tree)

    def restored(folder: str, like: Any) -> Any:
        found = checkpoints(tmp_path / folder).restore(state(0), kept=like)
        assert found is not None
        assert_same_bits(found.arrays, state(3))
        return found.kept

    assert_same_bits(restored("with", jax.tree.map(jnp.zeros_like, kept)), kept)
    assert restored("with", None) is restored("with", other) is restored("without", kept) is None


def test_what_is_restored_is_what_was_saved(tmp_path):
    save(tmp_path, 3, 7)
    found = checkpoints(tmp_path).restore(state(0))
    assert found is not None
    assert (found.step, found.notes) == (7, {"of": 7})
    assert_same_bits(found.arrays, state(7))


def test_where_there_is_none_nothing_is_restored(tmp_path):
    assert checkpoints(tmp_path / "new").restore(state(0)) is None


@pytest.mark.parametrize("saved_on, restored_on", [(1, 8), (8, 1), (8, 2), (1, 1)])
def test_arrays_come_back_to_the_devices_of_the_run_that_goes_on(tmp_path, saved_on, restored_on):
    def place(tree, count):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",))

        def put(x):
            if count == 1:
                return jax.device_put(x, SingleDeviceSharding(jax.devices()[0]))
            split = x.ndim and x.shape[0] % count == 0
            return jax.device_put(x, NamedSharding(mesh, PartitionSpec("data") if split else PartitionSpec()))

        return jax.tree.map(put, tree)

    with checkpoints(tmp_path) as run:
        run.save(1, place(state(1), saved_on), notes={})
    like = place(state(0), restored_on)
    found = checkpoints(tmp_path).restore(like)
    assert found is not None
    assert_same_bits(found.arrays, state(1))
    for a, b in zip(jax.tree.leaves(found.arrays), jax.tree.leaves(like), strict=True):
        assert a.sharding == b.sharding


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    next_step = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
    x = jnp.arange(2.0**20)
    expected = np.array(x)
    with checkpoints(tmp_path) as run:
        run.save(1, {"x": x}, notes={})
        for _ in range(20):
            x = next_step(x)
    found = checkpoints(tmp_path).restore({"x": jnp.zeros(2**20)})
    assert found is not None
    np.testing.assert_array_equal(found.arrays["x"], expected)


def test_a_temporary_checkpoint_goes_when_a_newer_one_is_complete(tmp_path):
    rules = {"keep": [CheckpointInterval(4)]}
    save(tmp_path, 3, **rules)
    assert steps_in(tmp_path) == [3]
    with checkpoints(tmp_path, **rules) as run:
        run.save(4, state(4), notes={})
        run.wait()
        assert steps_in(tmp_path) == [4], "that of an earlier start goes too"
        run.save(5, state(5), notes={})
        run.wait()
        assert steps_in(tmp_path) == [4, 5]
        run.save(6, state(6), notes={})
        run.save(7, state(7), notes={}, is_last=True)
    assert steps_in(tmp_path) == [4, 7]
    save(tmp_path, 9, 10, **rules)
    assert steps_in(tmp_path) == [4, 7, 10], "the last one of a run that was then made longer stays"


def test_what_is_not_known_to_be_temporary_stays(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "step-3" / DESCRIPTION).write_text("{}")
    save(tmp_path, 4)
    assert steps_in(tmp_path) == [3, 4]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A folder with the checkpoints of steps 1 and 2, both kept."""
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1, 2, keep=[CheckpointInterval(1)])
    return folder


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut_the_end(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [flip_a_byte, cut_the_end, Path.unlink], ids=lambda f: f.__name__)
def test_a_checkpoint_with_any_damaged_file_is_left_out_and_named(two, tmp_path, caplog, damage):
    files = [path.relative_to(two / "step-2") for path in (two / "step-2").rglob("*") if path.is_file()]
    assert len(files) > 4
    for number, name in enumerate(files):
        if (two / "step-2" / name).stat().st_size == 0:
            continue
        folder = tmp_path / str(number)
        shutil.copytree(two, folder)
        damage(folder / "step-2" / name)
        caplog.clear()
        found = checkpoints(folder).restore(state(0))
        assert found is not None
        if name.name in UNCHECKED:
            assert_same_bits(found.arrays, state(2))  # nothing is read from it
            continue
        assert_same_bits(found.arrays, state(1))
        (told,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
        assert f"{folder / 'step-2'} is damaged and is left out" in told
        assert name.name in told


def test_a_checkpoint_that_was_not_finished_is_left_out_named_and_removed(two, tmp_path, caplog):
    shutil.copytree(two, tmp_path / "run")
    half = tmp_path / "run" / "step-9.orbax-checkpoint-tmp-17"
    shutil.copytree(two / "step-2", half)
    found = checkpoints(tmp_path / "run").restore(state(0))
    assert found is not None and found.step == 2
    assert any(f"{half} was not finished and is left out" in r.getMessage() for r in caplog.records)
    assert not half.exists()


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_there_again(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    flip_a_byte(tmp_path / "run" / "step-2" / DESCRIPTION)
    with checkpoints(tmp_path / "run") as run:
        found = run.restore(state(0))
        assert found is not None and found.step == 1
        run.save(2, state(20), notes={})
    check_files(epath.Path(tmp_path / "run" / "step-2"))
    found = checkpoints(tmp_path / "run").restore(state(0))
    assert found is not None
    assert_same_bits(found.arrays, state(20))


FOREIGN = {"of Levanter": ["metadata.json", "d/x", "manifest.ocdbt"], "an export": ["config.json"], "a file": [""]}


@pytest.mark.parametrize("names", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_that_has_the_name_of_a_checkpoint_alone_is_not_replaced(two, tmp_path, names):
    shutil.copytree(two, tmp_path / "run")
    for name in names:
        path = tmp_path / "run" / "step-3" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of the user")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="step-3 holds what no checkpoint has .* a checkpoint would replace it"):
        checkpoints(tmp_path / "run").restore(state(0))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_that_was_deleted_by_half_is_left_out(two, tmp_path):
    for number, path in enumerate(sorted((two / "step-2").iterdir())):  # whatever is left
        folder = tmp_path / str(number)
        shutil.copytree(two / "step-1", folder / "step-1")
        (folder / "step-2").mkdir()
        if path.name != DESCRIPTION:
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / "step-2" / path.name)
        found = checkpoints(folder).restore(state(0))
        assert found is not None and found.step == 1


def test_what_is_at_hand_is_not_saved_again(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    written = read_description(epath.Path(tmp_path / "run" / "step-2"))
    with checkpoints(tmp_path / "run") as run:
        assert run.restore(state(0)) is not None
        run.save(2, state(20), notes={})
    assert read_description(epath.Path(tmp_path / "run" / "step-2")) == written
    check_files(epath.Path(tmp_path / "run" / "step-2"))


@pytest.mark.parametrize(
    "identity, lines",
    [
        ({**IDENTITY, "data": {"pairs": 13}}, ["data.pairs: 12 in the checkpoint, 13 in this run"]),
        (
            {"lora": {"r": 8, "target_modules": ["q_proj"]}, "data": {"pairs": 12}},
            ["lora.r: 4 in the checkpoint, 8 in this run", 'target_modules: null in the checkpoint, ["q_proj"] in'],
        ),
        ({"lora": IDENTITY["lora"]}, ["data.pairs: 12 in the checkpoint, nothing in this run"]),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_each_difference(two, identity, lines):
    with pytest.raises(ValueError, match="step-2 is a checkpoint of another run") as raised:
        checkpoints(two, identity=identity).restore(state(0))
    for line in lines:
        assert line in str(raised.value)


def test_arrays_of_other_shapes_are_refused_by_their_names(two):
    other = state(0)
    other["adapters"]["a"] = jnp.zeros((8, 4))
    with pytest.raises(ValueError) as raised:
        checkpoints(two).restore(other)
    assert 'adapters.a: "float32[8, 3]" in the checkpoint, "float32[8, 4]" in this run' in str(raised.value)
    assert "optimizer" not in str(raised.value)


def test_other_settings_may_change_and_are_told(two, caplog):
    found = checkpoints(two, settings={"optimizer": {"learning_rate": 2e-4}}).restore(state(0))
    assert found is not None and found.step == 2
    assert "optimizer.learning_rate: 0.0001 in the checkpoint, 0.0002 in this run" in caplog.text


def test_load_checkpoint_insists(two, tmp_path):
    with pytest.raises(FileNotFoundError, match="trainer.load_checkpoint=true, but .* holds no whole checkpoint"):
        checkpoints(tmp_path).restore(state(0), wanted=True)
    with pytest.raises(ValueError, match=r"trainer.load_checkpoint=false, but .* checkpoints of steps \[1, 2\]"):
        checkpoints(two).restore(state(0), wanted=False)
    assert checkpoints(two).restore(state(0), wanted=True) is not None
    assert checkpoints(tmp_path).restore(state(0), wanted=False) is None


def test_a_place_where_nothing_can_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="checkpoints cannot be written there .* Set trainer.checkpointer.base_path"):
        checkpoints(tmp_path / "file" / "run").restore(state(0))


def test_a_failure_in_the_background_is_told_and_leaves_the_earlier_ones(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(folder, description):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_arrays, "describe", full)
    with pytest.raises(OSError, match="step-2 could not be written; earlier ones are whole. .*No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    found = checkpoints(tmp_path).restore(state(0))
    assert found is not None
    assert_same_bits(found.arrays, state(1))


def test_what_ended_the_run_is_not_hidden_by_a_failure_in_the_background(tmp_path, monkeypatch, caplog):
    def full(folder, description):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_arrays, "describe", full)
    with pytest.raises(ZeroDivisionError), checkpoints(tmp_path) as run:
        run.save(1, state(1), notes={})
        raise ZeroDivisionError
    assert "could not be written" in caplog.text


def test_the_clock_counts_from_the_last_save(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(checkpoint_clock, "time", SimpleNamespace(monotonic=lambda: clock.now))
    run = checkpoints(tmp_path, save_interval="1m", keep=[CheckpointInterval(5)])
    clock.now += 1000  # before training begins
    with run:
        due = []
        for step in range(1, 13):
            clock.now += 25.0
            if run.is_due(step):
                due.append(step)
                run.save(step, state(step), notes={})
    assert due == [3, 5, 8, 10]
