"""The direction of imports: a module imports from layers below its own, never from above.

Read with ast, so imports inside functions and under TYPE_CHECKING count too.
"""

import ast
from pathlib import Path

import pytest

import lora_dpo_jax

PACKAGE = "lora_dpo_jax"
ROOT = Path(lora_dpo_jax.__file__).parent

# From the bottom up. A name stands for a module or for all of a package. Modules of one layer know nothing of each
# other; what a package does inside is its own affair.
LAYERS = [
    [
        "accuracy",
        "axes",
        "columns",
        "files",
        "json_objects",
        "lazy",
        "objective",
        "places",
        "platforms",
        "printable",
        "sampling",
        "tensor_names",
    ],
    ["dynamic_map", "redaction"],
    ["settings"],
    ["lora", "losses", "processes", "sharding", "tracking"],
    ["models", "data"],
    ["log_probs", "checkpoints", "decoding"],
    ["generation", "huggingface", "cost"],
    ["preference_objective"],
    ["evaluation"],
    ["reference_cache"],
    ["training", "report"],
    ["runs"],
    ["judging"],
    ["main"],
]

# What the layers alone would allow: (module or package, what it must not import).
FORBIDDEN = [
    ("losses", "data"),  # a loss sees log-probabilities, never tokens
    ("losses", "models"),
    ("data", "models"),  # data never sees a model
    ("data", "lora"),
    ("data", "log_probs"),
    ("training", "losses"),  # a step calls an objective, and knows neither its loss nor the scores it is made of
    ("training", "log_probs"),
    ("training", "preference_objective"),
    ("training.loop", "data"),
]

# Those that may know the whole config of a run: the commands, and what reads, assembles or checks a whole run. All
# others, hooks among them, are handed pieces of it.
COMMANDS = {"main.train", "main.evaluate", "main.judge", "main.plan", "main.__main__", "main.setup"}
KNOW_WHOLE_RUNS = {"runs.config", "runs.base", "runs.assembly", "runs.identity", "runs.outputs", "runs.capacity"}
KNOW_WHOLE_RUNS |= {"runs.provenance", "runs.row_prompts"}


def imports_of(source: str, module: str, is_package: bool) -> set[str]:
    """Dotted names below the package that `source` imports: of `from a import b`, both `a` and `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [node.module])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name.removeprefix(PACKAGE).lstrip(".") for name in found if (name + ".").startswith(PACKAGE + ".")}


def read_modules() -> dict[str, set[str]]:
    """Every module of the package, by its dotted name below it, with what it imports of the package."""
    modules = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        full_name = f"{PACKAGE}.{name}".rstrip(".")
        modules[name] = imports_of(path.read_text(encoding="utf-8"), full_name, is_package)
    return modules


MODULES = read_modules()


def is_within(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


def layer_of(module: str) -> tuple[int, str] | None:
    """The height of a module's layer, and the name that stands for it there."""
    for height, names in enumerate(LAYERS):
        for name in names:
            if is_within(module, name):
                return height, name
    return None


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_point_down(module):
    place = layer_of(module)
    assert place is not None, f"{module} is in no layer: name it in LAYERS, where it belongs"
    height, name = place
    for imported in sorted(MODULES[module]):
        target = layer_of(imported)
        if target is None or target == place:  # the root, which holds the version, or one's own package
            continue
        assert target[0] < height, f"{module} imports {imported}, which is not below {name}"


@pytest.mark.parametrize("importer, forbidden", FORBIDDEN)
def test_what_must_not_be_known_is_not_imported(importer, forbidden):
    for module in MODULES:
        if is_within(module, importer):
            known = sorted(name for name in MODULES[module] if is_within(name, forbidden))
            assert not known, f"{module} imports {known}"


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_no_module_imports_the_package_itself(module):
    """The root re-exports from all layers, so importing a name from it would point up."""
    for name in MODULES[module]:
        exported = name and "." not in name and name not in MODULES
        assert not exported or name == "__version__", f"{module} imports {name} from {PACKAGE}; import its own module"


def knows_whole_runs(imported: set[str]) -> bool:
    """By its name, or by that of its module alone."""
    of_module = {name for name in imported if name.startswith("runs.config.")}
    return "runs.config.TrainConfig" in of_module or ("runs.config" in imported and not of_module)


def test_no_module_outside_runs_imports_the_whole_runs_config_but_the_commands():
    knowing = {module for module, imported in MODULES.items() if knows_whole_runs(imported)}
    assert {name for name in knowing if not is_within(name, "runs")} <= COMMANDS
    assert {name for name in knowing if is_within(name, "runs")} <= KNOW_WHOLE_RUNS
    assert "main.train" in knowing and "runs.assembly" in knowing
    bench = sorted((Path(__file__).parents[1] / "bench").glob("*.py"))
    assert bench and not [
        path.name for path in bench if knows_whole_runs(imports_of(path.read_text(encoding="utf-8"), "bench", False))
    ]


@pytest.mark.parametrize(
    "source, knows",
    [
        ("from lora_dpo_jax.runs.config import TrainConfig", True),
        ("from lora_dpo_jax.runs import config", True),
        ("import lora_dpo_jax.runs.config", True),
        ("from lora_dpo_jax.runs.config import ModelConfig", False),
    ],
)
def test_every_way_to_the_whole_runs_config_is_seen(source, knows):
    assert knows_whole_runs(imports_of(source, "lora_dpo_jax.runs.report", is_package=False)) is knows


def test_no_module_is_called_utils():
    assert not [name for name in MODULES if "utils" in name.split(".")]


@pytest.mark.parametrize(
    "source, found",
    [
        ("import lora_dpo_jax.lora", {"lora"}),
        ("import lora_dpo_jax_other, jax", set()),
        ("from lora_dpo_jax import lora, losses", {"", "lora", "losses"}),
        ("from lora_dpo_jax.data.packing import pack", {"data.packing", "data.packing.pack"}),
        ("from . import packing", {"data", "data.packing"}),
        ("from ..lora import loraize", {"lora", "lora.loraize"}),
        ("def late():\n    from .. import lora", {"", "lora"}),
    ],
)
def test_every_way_of_importing_is_seen(source, found):
    assert imports_of(source, "lora_dpo_jax.data.batches", is_package=False) == found


def test_contributing_lists_every_room():
    table = (ROOT.parents[1] / "CONTRIBUTING.md").read_text()
    names = [name for layer in LAYERS for name in layer]
    assert [name for name in names if f"`{name}.py`" not in table and f"`{name}/`" not in table] == []
