"""Modules that a config names are imported before its types are resolved."""

import os
import sys
from pathlib import Path

import draccus
import pytest
import yaml
from tiny_runs import run_config

from lora_dpo_jax.losses import PreferenceLoss
from lora_dpo_jax.main.evaluate import EvaluateConfig
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.tracking import TrackerConfig

LOSS = """
from dataclasses import dataclass

import haliax as hax

from lora_dpo_jax import PreferenceLoss


@PreferenceLoss.register_subclass("my_hinge")
@dataclass(frozen=True)
class Hinge(PreferenceLoss):
    margin: float = 1.0

    def pair_loss(self, chosen, rejected, policy):
        return hax.nn.relu(self.margin - self.beta * (chosen - rejected))
"""
TRACKER = """
from dataclasses import dataclass

from lora_dpo_jax.tracking import NoTrackerConfig, TrackerConfig


@TrackerConfig.register_subclass("mine")
@dataclass(frozen=True)
class Mine(NoTrackerConfig):
    where: str = "here"
"""
CONFIG = """
initialize_from_hf: ./gone
data: {components: {prefs: {source: {type: url, train_urls: [./gone.jsonl]}}}}
"""


@pytest.fixture
def here(tmp_path, monkeypatch, own_choices) -> Path:
    """The current folder, with plugins in it. It is not on sys.path, as in a console script."""
    (tmp_path / "my_losses.py").write_text(LOSS)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "trackers.py").write_text(TRACKER)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("my_losses", "my_package", "broken")]:
        del sys.modules[name]


def from_words(*words: str, command: type = TrainConfig):
    return parse(command, ["--config_path", "run.yaml", *words])


def test_a_plugin_of_the_command_line_registers_a_loss_whatever_the_order_of_words(here):
    words = ["--loss", "{type: my_hinge}", "--loss.margin", "2"]
    for plugins in (["--plugins", "[my_losses]", *words], [*words, "--plugins", "[my_losses]"]):
        loss = from_words(*plugins).loss
        assert type(loss) is PreferenceLoss.get_choice_class("my_hinge") and loss.margin == 2.0


@pytest.mark.parametrize("command, more", [(TrainConfig, []), (EvaluateConfig, ["--output", "scores.jsonl"])])
def test_plugins_of_a_file_register_types_for_it_and_the_command_line(here, command, more):
    (here / "run.yaml").write_text(f"{CONFIG}\nplugins: [my_losses, my_package.trackers]\ntrainer: {{tracker: mine}}\n")
    config = from_words("--loss.type", "my_hinge", *more, command=command)
    assert config.plugins == ["my_losses", "my_package.trackers"]
    assert type(config.loss) is PreferenceLoss.get_choice_class("my_hinge")
    assert type(config.trainer.tracker[0]) is TrackerConfig.get_choice_class("mine")


def test_plain_values_that_draccus_decodes_import_plugins_too(here):
    config = run_config(here, here, plugins=["my_losses"], loss={"type": "my_hinge", "margin": 3.0})
    assert type(config.loss).__name__ == "Hinge"
    tree = yaml.safe_load(draccus.dump(config))
    assert tree["plugins"] == ["my_losses"] and tree["loss"]["type"] == "my_hinge"
    assert draccus.decode(TrainConfig, tree) == config


def test_what_a_plugin_registers_is_helped_with_like_the_rest(here, capsys):
    with pytest.raises(ValueError, match=r"^--loss\.marg_in is no setting\. The nearest: loss\.margin"):
        from_words("--plugins", "[my_losses]", "--loss.type", "my_hinge", "--loss.marg_in", "2")
    with pytest.raises(ValueError, match=r"^--loss\.q is no setting\. loss has .*beta.*, margin"):
        from_words("--plugins", "[my_losses]", "--loss.type", "my_hinge", "--loss.q", "2")
    with pytest.raises(SystemExit):
        from_words("--plugins", "[my_losses]", "--help")
    assert "--loss.margin" in capsys.readouterr().out


def test_a_class_without_its_method_is_named_with_it(here):
    lacking = (
        LOSS.replace("def pair_loss", "def pair_los").replace("Hinge", "Forgetful").replace("my_hinge", "forgetful")
    )
    (here / "my_losses.py").write_text(lacking)
    with pytest.raises(ValueError, match=r"^loss is a Forgetful, a class that does not define the method pair_loss$"):
        from_words("--plugins", "[my_losses]", "--loss.type", "forgetful")


def test_a_plugin_on_the_path_is_imported_from_anywhere(here, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(elsewhere := tmp_path_factory.mktemp("elsewhere"))
    (elsewhere / "run.yaml").write_text(CONFIG)
    monkeypatch.syspath_prepend(str(here))
    assert from_words("--plugins", "[my_losses]", "--loss.type", "my_hinge").loss.margin == 1.0


def test_an_installed_module_comes_before_a_file_of_the_current_folder(here):
    (here / "colorsys.py").write_text("raise RuntimeError('the file was imported')")
    sys.modules.pop("colorsys", None)
    from_words("--plugins", "[colorsys]")


def how_it_ends(given: str) -> str:
    """The error for the setting, the same from the command line and the file, whatever other settings say."""
    errors = []
    for words in (["--plugins", given], ["--loss.type", "none", "--plugins", given]):
        with pytest.raises(ValueError) as error:
            from_words(*words)
        errors.append(str(error.value))
    Path("run.yaml").write_text(f"{CONFIG}\nplugins: {given}\nloss: {{type: none}}\n")
    with pytest.raises(ValueError) as error:
        from_words()
    assert [*errors, str(error.value)] == [errors[0]] * 3
    return errors[0]


@pytest.mark.parametrize(
    "given, told",
    [
        ("[my_loses]", "plugins: my_loses cannot be imported: there is no module my_loses on sys.path or in the curr"),
        ("[my_package.gone]", "plugins: my_package.gone cannot be imported: there is no module my_package.gone on sys"),
        ("[gone.losses]", "plugins: gone.losses cannot be imported: there is no module gone on sys.path"),
        (
            "[./my_losses.py]",
            "plugins: './my_losses.py' is no module's name; write it as in `import my_package.losses`",
        ),
        ("my_losses", "plugins='my_losses' must be a list of texts"),
        ("null", "plugins is null; it must be a list of texts"),
        ("[my_losses, {}]", "plugins.1="),
    ],
)
def test_a_plugin_that_is_not_found_is_named(here, given, told):
    assert how_it_ends(given).startswith(told)


@pytest.mark.parametrize(
    "source, raised",
    [
        ("import gone", "ModuleNotFoundError: No module named 'gone'"),
        ("raise KeyError('a')", "KeyError: 'a'"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("x = (", "SyntaxError: '(' was never closed (broken.py, line 1)"),
        ("import sys; sys.exit()", "SystemExit"),
    ],
)
def test_what_a_plugin_raises_is_told_in_a_line(here, source, raised):
    (here / "broken.py").write_text(source)
    assert how_it_ends("[broken]") == f"plugins: broken cannot be imported: it raised {raised}"


def test_a_type_that_no_plugin_registers_is_named_with_those_that_are(here):
    with pytest.raises(ValueError, match="loss.type='my_hing' must be one of .*my_hinge; did you mean my_hinge"):
        from_words("--plugins", "[my_losses]", "--loss.type", "my_hing")
    with pytest.raises(ValueError, match="; a type of your own needs its module in plugins"):
        from_words("--loss.type", "unheard_of")
