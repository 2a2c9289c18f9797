import dataclasses
import re
import typing
from typing import Literal

import pytest

from lora_dpo_jax.data.config import FormatConfig
from lora_dpo_jax.lora import LoraConfig
from lora_dpo_jax.models.compute import ComputeConfig
from lora_dpo_jax.settings.choices import check_choices
from lora_dpo_jax.settings.schema import hints_of
from lora_dpo_jax.training.loop import TrainerConfig
from lora_dpo_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """A section of a config."""

    speed: Literal["slow", "fast"] = "slow"
    limit: Literal[1, 2] | None = None
    names: list[Literal["a"]] = dataclasses.field(default_factory=list)  # checked when it is decoded
    free: str = "any"


@pytest.mark.parametrize("values", [{}, {"speed": "fast"}, {"limit": 2}, {"limit": None}, {"names": ["a"]}])
def test_a_value_of_the_literal_is_taken(values):
    check_choices(Settings(**values))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"speed": "idle"}, "car.speed='idle' must be one of slow, fast"),
        ({"speed": None}, "car.speed=None must be one of slow, fast"),
        ({"speed": ["slow"]}, "car.speed=['slow'] must be one of slow, fast"),
        ({"limit": 3}, "car.limit=3 must be one of 1, 2, or null"),
    ],
)
def test_another_value_is_refused_with_the_choices(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_choices(Settings(**values), "car")


SECTIONS = {"format": FormatConfig, "lora": LoraConfig, "optimizer": OptimizerConfig, "trainer": TrainerConfig}
LITERALS = [
    (section, name)
    for section, config in SECTIONS.items()
    for name, hint in hints_of(config).items()
    if typing.get_origin(hint) is Literal or Literal in map(typing.get_origin, typing.get_args(hint))
]


@pytest.mark.parametrize("section, name", LITERALS)
def test_a_script_cannot_give_a_section_another_value(section, name):
    with pytest.raises(ValueError, match=rf"^{section}\.{name}='neither' must be one of "):
        SECTIONS[section](**{name: "neither"})


@pytest.mark.parametrize("name, first", [("gradient_checkpointing", "none"), ("attention", "auto")])
def test_what_names_an_implementation_is_one_of_those_there_are(name, first):
    with pytest.raises(ValueError, match=rf"^model\.{name}='neither' must be one of {first}, "):
        ComputeConfig(**{name: "neither"})
