import pytest
from etils import epath

from lora_dpo_jax.checkpoints.config import CheckpointerConfig, CheckpointInterval


@pytest.mark.parametrize(
    "keep, kept",
    [
        ([], []),
        ([(4, None)], [4, 8, 12, 16, 20, 24]),
        ([(2, 6), (10, None)], [2, 4, 6, 10, 20]),
        ([(1, 3), (5, 15)], [1, 2, 3, 5, 10, 15]),
    ],
)
def test_the_first_rule_that_reaches_a_step_decides(keep, kept):
    config = CheckpointerConfig(keep=[CheckpointInterval(*rule) for rule in keep])
    assert [step for step in range(1, 26) if config.keeps(step)] == kept


@pytest.mark.parametrize(
    "text, seconds", [("10m", 600), ("1h30m", 5400), ("90s", 90), ("15", 900), ("0.5", 30), ("2 h", 7200), (None, None)]
)
def test_intervals_are_read(text, seconds):
    assert CheckpointerConfig(save_interval=text).interval_seconds == seconds


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(save_interval="soon"), "trainer.checkpointer.save_interval='soon' is no time; for example 10m"),
        (dict(save_interval="10x"), "'10x' is no time"),
        (dict(save_interval="0m"), "'0m' is no time"),
        (dict(base_path="s3://bucket/runs"), "base_path='s3://bucket/runs': checkpoints go to a folder or to gs://"),
        (dict(keep=[CheckpointInterval(0)]), "every must be at least 1"),
        (dict(keep=[CheckpointInterval(1), CheckpointInterval(2)]), r"until=\[None, None\] must rise"),
        (dict(keep=[CheckpointInterval(1, 9), CheckpointInterval(2, 9)]), r"until=\[9, 9\] must rise"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        CheckpointerConfig(**settings)


def test_the_folder_is_the_runs_own_or_the_one_that_is_set(tmp_path):
    run_dir = tmp_path / "logs" / "mine"
    assert CheckpointerConfig().folder(run_dir, "mine") == epath.Path(run_dir / "checkpoints")
    shared = CheckpointerConfig(base_path=str(tmp_path / "shared"))
    assert shared.folder(run_dir, "mine") == epath.Path(tmp_path / "shared" / "mine")
    flat = CheckpointerConfig(base_path=str(tmp_path / "shared"), append_run_id_to_base_path=False)
    assert flat.folder(run_dir, "mine") == epath.Path(tmp_path / "shared")
