"""Every setting of every command: in the docs, in --help, and safe from values that nobody means."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal, Union

import pytest
from hostile_values import hostile_values, how_it_ends

from lora_dpo_jax.losses import Mix
from lora_dpo_jax.main.evaluate import EvaluateConfig
from lora_dpo_jax.main.generate import GenerateConfig
from lora_dpo_jax.main.plan import PlanConfig
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.settings.decoding import config_of
from lora_dpo_jax.settings.schema import NAME, NUMBER, Setting, hints_of, settings_of

LEAST: dict[type, dict[str, Any]] = {
    TrainConfig: {
        "initialize_from_hf": "base",
        "data": {"components": {"prefs": {"source": {"type": "url", "train_urls": ["a.jsonl"]}}}},
    }
}
LEAST[EvaluateConfig] = LEAST[TrainConfig] | {"output": "scores.jsonl"}
LEAST[PlanConfig] = LEAST[TrainConfig] | {"topology": "v5e:4x4"}
LEAST[GenerateConfig] = {"model": "base", "prompts": ["Hello"]}
SETTINGS = [(command, setting) for command in (TrainConfig, GenerateConfig) for setting in settings_of(command)]
# Of the others, their own.
SETTINGS += [
    (command, setting)
    for command in (EvaluateConfig, PlanConfig)
    for setting in settings_of(command)
    if setting.path not in {known.path for known in settings_of(TrainConfig)}
]
EACH_SETTING = pytest.mark.parametrize(
    "command, setting", SETTINGS, ids=[f"{command.__name__}-{setting.path}" for command, setting in SETTINGS]
)
# What a word of the command line may be besides a value.
WORDS = (
    *("[", "{", "}", "[a, b", "{a: b", "*", "&x", "!include x", "!!python/object:os.system x", "%", "@x", "`", "- a"),
    *(
        "'",
        '"',
        "'it''s'",
        "#",
        "a: b: c",
        "? x",
        "| x",
        "include x",
        "null",
        "~",
        "",
        " ",
        "yes",
        "010",
        "1_000",
        "12:30",
    ),
    *(
        "2026-08-01",
        "0x10",
        "-1",
        "=",
        "\x1b[2J",
        "\t",
        "\ud800",
        "[" * 500,
        "&a [*a]",
        "9" * 5000,
        ".inf",
        "<<: {a: 1}",
    ),
)


def right_value(setting: Setting) -> Any:
    """One that is near to what is right, for `hostile_values` to start from."""
    if setting.default is not dataclasses.MISSING and setting.default is not None:
        return setting.default
    annotation = next(member for member in members(setting.annotation) if member is not type(None))
    examples = {int: 3, float: 0.5, str: "some", bool: True}
    if annotation in examples:
        return examples[annotation]
    return {"x": 1} if typing.get_origin(annotation) is dict else ["x"]


def members(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def tree_with(command: type, setting: Setting, value: Any) -> dict[str, Any]:
    """The least configuration of the command, with the setting in it."""
    path = setting.path.replace(f".{NAME}.", ".prefs.").split(".")
    tree = value
    for name in reversed(path):
        tree = [tree] if name == NUMBER else {name: tree}
        if setting.types and path[-1] != "type" and name == path[-1]:
            tree |= {"type": setting.types[0]}
        if setting.types and setting.types[0] == "hf" and name == path[-1]:
            tree = {"id": "some/rows"} | tree
        if name == "every" or name == "until":
            tree = {"every": 5} | tree
    return merged(LEAST[command], tree)


def merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict) or "type" in new:
        return new
    return old | {name: merged(old.get(name), value) for name, value in new.items()}


def check_types(config: Any) -> None:
    """That each field has a value of its type, with none that is not finite."""
    for name, annotation in hints_of(type(config)).items():
        assert is_of(getattr(config, name), annotation), f"{type(config).__name__}.{name}"


def is_of(value: Any, annotation: Any) -> bool:
    kind, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if kind in (Union, types.UnionType):
        return any(is_of(value, member) for member in arguments)
    if kind is Literal:
        return value in arguments and type(value) in map(type, arguments)
    if kind is list:
        return type(value) is list and all(is_of(item, arguments[0]) for item in value)
    if kind is dict:
        return type(value) is dict and all(type(key) is str and is_of(value[key], arguments[1]) for key in value)
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, typing.cast(type, annotation)):
            return False
        check_types(value)
        return True
    if annotation is float:
        return type(value) is float and math.isfinite(value)
    return type(value) is annotation


def check_use(config: Any) -> None:
    """What a run asks of its settings before it reads anything."""
    if isinstance(config, TrainConfig):
        trainer = config.trainer
        assert trainer.steps(100) >= 1
        run_dir = trainer.run_dir(trainer.id or "some")
        assert run_dir.parent == trainer.run_dir("other").parent
        trainer.checkpointer.folder(run_dir, run_dir.name)
        loss = config.preference_loss
        losses = [loss for _, loss in loss.parts] if isinstance(loss, Mix) else [loss]
        assert losses and all(loss.beta > 0 for loss in losses) and config.lora.scaling > 0
        assert 0 <= config.held_out_fraction < 1
        assert trainer.mesh.compute and trainer.mesh.parameters is not None
        assert trainer.precision


@EACH_SETTING
def test_a_hostile_value_is_taken_rightly_or_told_in_a_line_that_names_the_setting(command, setting):
    for value in hostile_values(right_value(setting)):
        made = []
        line = how_it_ends(
            lambda value=value, made=made: made.append(config_of(command, tree_with(command, setting, value)))
        )
        if line is None:
            check_types(made[0])
            check_use(made[0])
        else:
            assert setting.name in line.partition("must")[0] or setting.section in line, (value, line)
            assert line.isprintable(), (value, line)


@EACH_SETTING
def test_any_word_of_the_command_line_is_taken_rightly_or_told_in_a_line(command, setting):
    if NUMBER in setting.path.split("."):
        return  # a part of a list, which is given as a whole
    for word in WORDS:
        given = [
            text
            for name, value in LEAST[command].items()
            if name != setting.path
            for text in (f"--{name}", value if isinstance(value, str) else str(value))
        ]
        made = []
        path = setting.path.replace(f".{NAME}.", ".prefs.")
        args = [*given, f"--{path}={word}"]
        line = how_it_ends(lambda args=args, made=made: made.append(parse(command, args)))
        if line is None:
            check_types(made[0])
            check_use(made[0])
        else:
            assert line.isprintable(), (word, line)
