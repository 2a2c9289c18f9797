"""How every objective does on the quickstart's data, with the settings of config/objectives.yaml:

    python -m bench.objectives --seeds '[0, 1, 2]' --out build/objectives.jsonl

Each run is a whole one, as the command line makes it, in a folder that goes afterwards. When a run ends, a line of JSON
is added to `--out`; what is there already is not run again. Then the table is printed. Two cores: half a minute a run.
"""

import contextlib
import io
import json
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_dpo_jax.losses import LOSSES
from lora_dpo_jax.main.train import TrainConfig
from lora_dpo_jax.main.train import main as train
from lora_dpo_jax.settings.arguments import parse

CONFIG = Path(__file__).parents[1] / "config"


@dataclass(frozen=True)
class Options:
    objectives: list[str] = field(default_factory=lambda: list(LOSSES))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps_per_eval: int = 25
    out: str = "build/objectives.jsonl"


def main() -> None:
    options, chosen = parse(Options), settings()
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(run["objective"], run["seed"]) for run in runs}
    for seed in options.seeds:
        for name in options.objectives:
            if (name, seed) not in done:
                runs.append(measure(name, chosen[name], seed, options.steps_per_eval))
                with out.open("a") as lines:
                    lines.write(json.dumps(runs[-1]) + "\n")
    print(markdown([run for run in runs if run["objective"] in options.objectives]))


def settings() -> dict[str, dict[str, Any]]:
    """By objective: what differs from a config file."""
    return yaml.safe_load((CONFIG / "objectives.yaml").read_text())


def words(name: str, different: Mapping[str, Any]) -> list[str]:
    """The command line of an entry of config/objectives.yaml."""
    changes = {"loss.type": name, **different}
    path = CONFIG / changes.pop("config", "quickstart.yaml")
    if name == "mix":
        del changes["loss.type"]  # its config has the parts
    return ["--config_path", str(path), *(f"--{setting}={value}" for setting, value in changes.items())]


def measure(name: str, different: Mapping[str, Any], seed: int, steps_per_eval: int) -> dict[str, Any]:
    """One run: held-out values at each evaluation. Log-probs are in nats, less those of step 0."""
    with tempfile.TemporaryDirectory() as folder:
        changes = [f"--trainer.seed={seed}", f"--trainer.steps_per_eval={steps_per_eval}", "--sample_prompts=[]"]
        changes += [f"--trainer.log_dir={folder}/logs"]
        changes += ["--peft_save_path=null", "--merged_hf_save_path=null"]
        config = parse(TrainConfig, [*words(name, different), *changes])
        with contextlib.redirect_stdout(io.StringIO()):
            train(config)
        (file,) = Path(folder).rglob("metrics.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    held_out = [line for line in lines if "eval/loss" in line]
    first = held_out[0]
    return {
        "objective": name,
        "seed": seed,
        "steps": [line["step"] for line in held_out],
        "loss": [line["eval/loss"] for line in held_out],
        "accuracy": [line["eval/dpo_accuracy"] for line in held_out],
        **{
            side: [line[f"eval/logps/{side}"] - first[f"eval/logps/{side}"] for line in held_out]
            for side in ("chosen", "rejected")
        },
    }


def markdown(runs: list[dict[str, Any]]) -> str:
    """A row for each objective: accuracies of the seeds, and the mean change of log-probs."""
    lines = ["| type | held-out accuracy before | after, by seed | chosen | rejected |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(run["objective"] for run in runs):
        of_it = sorted((run for run in runs if run["objective"] == name), key=lambda run: run["seed"])
        after = ", ".join(f"{100 * run['accuracy'][-1]:.1f}%" for run in of_it)
        moved = " | ".join(f"{statistics.mean(run[side][-1] for run in of_it):+.2f}" for side in ("chosen", "rejected"))
        lines.append(f"| `{name}` | {of_it[0]['accuracy'][0]:.1%} | {after} | {moved} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
