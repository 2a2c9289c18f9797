import re
from dataclasses import dataclass, field

import draccus
import pytest

from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.settings.config_file import read_yaml
from lora_dpo_jax.settings.decoding import config_of
from lora_dpo_jax.tracking import (
    MlflowConfig,
    NoTrackerConfig,
    TensorboardConfig,
    TrackerConfigs,
    TrackioConfig,
    WandbConfig,
)


@dataclass(frozen=True)
class Run:
    """Stands for the config of a trainer."""

    tracker: TrackerConfigs = field(default_factory=list)


SPELLINGS = {
    "wandb": [WandbConfig()],
    "none": [NoTrackerConfig()],
    "null": [],
    "[]": [],
    "[wandb, tensorboard]": [WandbConfig(), TensorboardConfig()],
    "{type: wandb, project: p, tags: [a, b]}": [WandbConfig(project="p", tags=["a", "b"])],
    "[{type: wandb, mode: offline}, {type: tensorboard}]": [WandbConfig(mode="offline"), TensorboardConfig()],
    "[tensorboard, {type: wandb, entity: e}]": [TensorboardConfig(), WandbConfig(entity="e")],
    "[{type: trackio, project: p}, {type: mlflow, experiment: e}]": [
        TrackioConfig(project="p"),
        MlflowConfig(experiment="e"),
    ],
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_every_spelling_of_tracker_parses_in_a_file_and_on_the_command_line(text):
    assert config_of(Run, read_yaml(f"tracker: {text}")).tracker == SPELLINGS[text]
    assert parse(Run, ["--tracker", text]).tracker == SPELLINGS[text]


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_dumped_config_parses_to_itself(text):
    run = Run(tracker=SPELLINGS[text])
    assert config_of(Run, read_yaml(str(draccus.dump(run)))) == run


@pytest.mark.parametrize(
    "text, message",
    [
        ("comet", "tracker.0.type='comet' must be one of none, mlflow, tensorboard, trackio, wandb"),
        (
            "[wandb, {project: p}]",
            "tracker.1.type is missing; it must be one of none, mlflow, tensorboard, trackio, wandb",
        ),
        ("{type: tensorboard, entity: e}", "tracker.0.entity is a setting of type wandb alone"),
        ("{type: wandb, mode: sometimes}", "tracker.0.mode='sometimes' must be one of online, offline, disabled"),
        ("{type: wandb, project: null, tags: null}", "tracker.0.tags is null; it must be a list of texts"),
    ],
)
def test_a_wrong_tracker_is_refused_with_its_place_and_the_choices(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_of(Run, read_yaml(f"tracker: {text}"))
