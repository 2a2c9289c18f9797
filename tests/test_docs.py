"""What the documentation shows works, and what can be set is documented."""

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)


def test_the_code_of_the_library_page_runs(monkeypatch, tmp_path, capsys, own_choices):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LORA_DPO_JAX_CACHE", str(tmp_path))
    train, own_pairs, hinge, mesh = code_blocks("library.md")
    names: dict = {}
    exec(train, names)
    losses = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < losses[0]
    mine = dict(names)
    exec(own_pairs, mine)
    assert mine["pairs"].lengths.tolist() == [[3, 3, 2]]
    exec(hinge, names)
    exec(mesh, names)
    state = names["TrainState"].init(
        names["loraize"](names["model"], names["LoraConfig"](), key=names["jax"].random.key(0)),
        names["optimizer"],
        key=names["jax"].random.key(1),
    )
    with names["placement"].scope():
        state, metrics = names["step"](state, next(iter(names["batches"])))
    assert float(metrics.values["loss"]) == pytest.approx(0.693, abs=0.05)


def test_every_test_that_the_table_of_faults_names_is_there():
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 20
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text()]
    assert not missing


@pytest.mark.parametrize(
    "command", ["setup.TrainConfig", "evaluate.EvaluateConfig", "generate.GenerateConfig", "plan.PlanConfig"]
)
def test_every_setting_is_in_the_configuration_reference(command):
    from lora_dpo_jax.settings.schema import settings_of

    module, _, name = command.partition(".")
    config = getattr(import_module(f"lora_dpo_jax.main.{module}"), name)
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert not [setting.path for setting in settings_of(config) if not re.search(rf"\b{setting.name}\b", code_in(page))]


def code_in(page: str) -> str:
    """What stands in backticks."""
    return "\n".join(re.findall(r"`([^`]+)`", page))
