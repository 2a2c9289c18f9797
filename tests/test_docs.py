"""What the documentation shows works, and what can be set is documented."""

import dataclasses
import io
import re
import shlex
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from tiny_pairs import adapters_of, moved

from bench import pictures
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.log_probs import score_with_reference
from lora_dpo_jax.training.step import micro_batches

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "main": "runs.config.TrainConfig",
    "main.evaluate": "main.evaluate.EvaluateConfig",
    "main.generate": "main.generate.GenerateConfig",
    "main.plan": "main.plan.PlanConfig",
    "main.check": "main.check.CheckConfig",
    "main.combine": "main.combine.CombineConfig",
    "main.judge": "main.judge.JudgingConfig",
    "main.pairs": "main.pairs.PairsConfig",
    "main.report": "main.report.ReportConfig",
}


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Any]:
    """The names that the first block of the library page defines, what it printed, and the other blocks."""
    names: dict[str, Any] = {}
    train, *others = code_blocks("library.md")
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(io.StringIO()) as printed:
        patched.chdir(ROOT)
        patched.setenv("LORA_DPO_JAX_CACHE", str(tmp_path_factory.mktemp("library")))
        exec(train, names)
    return names | {"printed": printed.getvalue(), "others": others}


@pytest.fixture
def library(trained, monkeypatch, own_choices) -> dict[str, Any]:
    """A copy of them, to which a test may add those of other blocks."""
    monkeypatch.chdir(ROOT)
    return dict(trained)


def new_state(names: dict[str, Any], seed: int = 1) -> Any:
    """A state of the page's model with new adapters that are not zero, as if it had been trained."""
    weights = names["load_model"](names["folder"], names["read_config"](names["folder"]), dtype="float32")
    model = moved(names["loraize"](weights, names["LoraConfig"](r=4), key=jax.random.key(0)), size=0.02)
    return names["TrainState"].init(model, names["optimizer"], key=jax.random.key(seed))


def test_the_code_of_the_library_page_runs(library):
    losses = [float(line.split()[0]) for line in library["printed"].splitlines()]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < losses[0]
    own_pairs, hinge, sure, likelihood, my_step, mesh = library["others"]
    mine = dict(library)
    exec(own_pairs, mine)
    assert mine["pairs"].arrays.response_tokens.tolist() == [3, 2]
    assert mine["lists"].arrays.response_counts.tolist() == [3]
    for block in (hinge, sure, likelihood, my_step):
        exec(block, library)
    exec(mesh, library)
    state = library["TrainState"].init(
        library["loraize"](library["model"], library["LoraConfig"](), key=jax.random.key(0)),
        library["optimizer"],
        key=jax.random.key(1),
    )
    with library["placement"].scope():
        state, metrics = library["step"](state, next(iter(library["batches"])))
    assert float(metrics.values["loss"]) == pytest.approx(0.693, abs=0.05)


def test_a_step_of_ones_own_gives_the_sums_of_a_train_step(library):
    """Over several parts and micro-batches."""
    *_, my_step, _ = library["others"]
    exec(my_step, library)
    ids = [np.arange(12)]
    shapes = library["choose_shapes"](ids, library["pairs"].sizes, longest_row=256)
    (batch,) = library["packed_batches"](library["pairs"], ids, shapes, place=jax.device_put)
    assert sum(part.num_micro_batches for part in batch) > 2
    state = new_state(library)
    sgd, key = library["sgd"], jax.random.fold_in(state.key, 0)
    mine, _, loss = library["my_step"](state.model, sgd.init(state.model), batch, key)
    step = library["TrainStep"](library["PreferenceObjective"](library["Dpo"]()), sgd)
    theirs, metrics = step(library["TrainState"].init(state.model, sgd, key=state.key), batch)
    assert float(loss) == pytest.approx(float(metrics.values["loss"]), abs=1e-6)
    for one, other in zip(jax.tree.leaves(adapters_of(mine)), jax.tree.leaves(adapters_of(theirs.model)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-7)


def test_an_objective_of_ones_own_is_accumulated_over_all_parts(library):
    *_, likelihood, _, _ = library["others"]
    exec("import haliax as hax", library)
    exec(likelihood, library)
    table = library["pairs"].subset(np.arange(12))
    ids = [np.arange(12)]
    losses = []
    for longest_row in (None, 256):
        shapes = library["choose_shapes"](ids, table.sizes, longest_row=longest_row, max_shapes=2)
        (batch,) = library["packed_batches"](table, ids, shapes, place=jax.device_put)
        _, metrics = library["TrainStep"](library["likelihood"], library["optimizer"])(new_state(library), batch)
        assert float(metrics.values["nll"]) == pytest.approx(float(metrics.values["loss"]), rel=1e-6)
        losses.append(float(metrics.values["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] > 0.1


def test_a_loss_of_tokens_and_a_column_is_what_it_says(library):
    """Against the same in NumPy, from the scores of each token."""
    _, hinge, sure, *_ = library["others"]
    exec(hinge, library)
    exec(sure, library)
    examples = [
        dataclasses.replace(x, columns={"difficulty": 0.1 * n})
        for n, x in enumerate(library["pairs"][i] for i in range(6))
    ]
    table = library["whole_table"]({"mine": MemoryExamples(examples)})
    ids = [np.arange(6)]
    shapes = library["choose_shapes"](ids, table.sizes)
    (batch,) = library["packed_batches"](table, ids, shapes, place=jax.device_put, columns=["difficulty"])
    state, loss = new_state(library), library["Sure"](beta=0.5, temperature=1.5)
    _, metrics = library["TrainStep"](library["PreferenceObjective"](loss), optax.sgd(0.0))(state, batch)

    model = new_state(library).model
    expected = []
    for micro in micro_batches(batch):
        policy, reference = score_with_reference(
            model, None, micro, per_token=True, per_token_of_reference=True, statistics=("entropy",)
        )
        weight = np.exp(-np.asarray(policy.per_token.statistics["entropy"].array) / 1.5)
        ratio = np.asarray(policy.per_token.log_probs.array - reference.per_token.log_probs.array) * weight
        for row in range(ratio.shape[0]):
            for slot, number in enumerate(np.asarray(micro.examples.ids.array[row])):
                if number >= 0:
                    of = [
                        ratio[row][np.asarray(micro.target_response.array[row]) == 2 * slot + k].sum() for k in (0, 1)
                    ]
                    expected.append((1 - 0.1 * number) * np.logaddexp(0, -0.5 * (of[0] - of[1])))
    assert float(metrics.values["loss"]) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(metrics.values["sure_loss"]) == pytest.approx(np.mean(expected), rel=1e-5)


def commands_of(page: str) -> list[list[str]]:
    """The words after `python -m lora_dpo_jax.`, of each such command in a page's bash blocks."""
    text = (ROOT / "docs" / page).read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    started = "lora_dpo_jax."
    return [[words[2].removeprefix(started), *words[3:]] for words in lines if words[2:3] and started in words[2]]


def test_the_commands_of_the_on_policy_page_parse_and_hand_on_their_files(monkeypatch):
    from lora_dpo_jax.main.generate import parse as parse_generate
    from lora_dpo_jax.main.pairs import PairsConfig
    from lora_dpo_jax.runs.config import TrainConfig
    from lora_dpo_jax.settings.arguments import parse

    monkeypatch.chdir(ROOT)
    ways = {
        "main": lambda words: parse(TrainConfig, words),
        "main.pairs": lambda words: parse(PairsConfig, words),
        "main.generate": parse_generate,
    }
    configs = [ways[command](words) for command, *words in commands_of("on_policy.md")]
    reward, pairs, trained, before, after, *others = configs
    assert pairs.scorer.adapter == reward.peft_save_path and pairs.scorer.beta == reward.preference_loss.beta
    assert trained.data.components["own"].source.train_urls == [pairs.output]
    assert (before.adapter, after.adapter) == (None, trained.peft_save_path)
    judged, given, second, third = others
    assert (judged.scorer.judge.model, given.scorer.field) == ("judge-model", "score")
    assert third.data.components["own"].source.train_urls == [second.output]


def test_every_test_that_the_table_of_faults_names_is_there():
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 20
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text()]
    assert not missing


def settings_of_command(command: str) -> list[Any]:
    from lora_dpo_jax.settings.schema import settings_of

    module, _, name = COMMANDS[command].rpartition(".")
    return settings_of(getattr(import_module(f"lora_dpo_jax.{module}"), name))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_is_in_the_configuration_reference(command):
    page = code_in((ROOT / "docs" / "configuration.md").read_text())
    missing = [setting.path for setting in settings_of_command(command) if not re.search(rf"\b{setting.name}\b", page)]
    assert not missing


def code_in(page: str) -> str:
    """What stands in backticks."""
    return "\n".join(re.findall(r"`([^`]+)`", page))


def commands_in(page: str) -> list[tuple[str, list[str]]]:
    """Commands of this library in the blocks of a page: the part of `lora_dpo_jax` that runs, and its words."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines() if language in ("", "bash") else []
        for command in (c for line in lines for c in line.split("&&") if "python -m lora_dpo_jax.main" in c):
            words = shlex.split(command, comments=True)
            start = words.index("-m") + 1
            found.append((words[start].removeprefix("lora_dpo_jax."), words[start + 1 :]))
    return found


@pytest.mark.parametrize(
    "page",
    ["README.md", *(f"docs/{name}.md" for name in "index start recipes evaluating decision on_policy".split())],
)
def test_the_commands_of_the_first_pages_name_settings_and_files_that_there_are(page):
    commands = commands_in((ROOT / page).read_text())
    assert commands
    for command, words in commands:
        known = {setting.path for setting in settings_of_command(command)} | {"config_path", "prompt"}
        options = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
        assert not [option for option in options if not any(f"{option}.".startswith(f"{name}.") for name in known)]
        assert not [word for word in words if word.startswith(("config/", "examples/")) and not (ROOT / word).exists()]


def test_the_pictures_are_those_that_the_script_draws_from_the_stored_results():
    drawn = {path.name: path.read_text(encoding="utf-8") for path in pictures.FOLDER.iterdir()}
    assert drawn == pictures.files(), "run `python -m bench.pictures`"


def test_every_picture_is_shown_with_words_on_light_and_on_dark_pages():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    shown = re.findall(r"!\[([^\]]{20,})\]\(pictures/([\w-]+)\.svg#only-(light|dark)\)", pages)
    expected = {(name, "light") for name in pictures.PICTURES} | {(f"{n}-dark", "dark") for n in pictures.PICTURES}
    assert {(name, scheme) for _, name, scheme in shown} == expected
    assert len(shown) == pages.count("](pictures/")
    assert len({(words, name.removesuffix("-dark")) for words, name, _ in shown}) == len(shown) // 2


@pytest.mark.parametrize("results", ["compare_cpu", "compare_gpu", "ladder"])
def test_what_is_charted_stands_in_the_tables_of_the_performance_page(results):
    page = (ROOT / "docs" / "performance.md").read_text().replace(",", "")
    lines = re.findall(r"^\|.*", page, flags=re.MULTILINE)
    table = [set(map(float, re.findall(r"(?<=\| )\d+(?:\.\d+)?(?= \|)", line))) for line in lines]
    for row in pictures.results(results):
        numbers = {row[name] for name in row.keys() - {"pairs_per_second"} if isinstance(row[name], int | float)}
        assert len(numbers) > 2 and any(numbers <= found for found in table), row


def test_every_recipe_is_in_the_table_of_recipes():
    page = (ROOT / "docs" / "recipes.md").read_text()
    rows = {cells[0]: cells[1:] for line in page.splitlines() if (cells := line.strip("| ").split(" | "))}
    recipes = {f"`config/{path.name}`" for path in (ROOT / "config").glob("*.yaml")}
    assert {name for name in rows if name.startswith("`config/")} == recipes
    assert not [name for name in recipes if not rows[name][0]]


def test_every_public_name_is_in_the_api_reference():
    import lora_dpo_jax
    import lora_dpo_jax.data

    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").iterdir())
    shown = set(re.findall(r"^::: (\S+)$", pages, flags=re.MULTILINE))
    public = {f"{package.__name__}.{name}" for package in (lora_dpo_jax, lora_dpo_jax.data) for name in package.__all__}
    assert not public - shown
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name
