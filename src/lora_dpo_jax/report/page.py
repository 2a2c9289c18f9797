"""From a run's files to report.html: one file that loads nothing, runs no script, and shows data as text."""

import json
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import lora_dpo_jax
from lora_dpo_jax.files import replace_file
from lora_dpo_jax.printable import printable
from lora_dpo_jax.report import charts
from lora_dpo_jax.report.charts import Chart, Table, number, percent
from lora_dpo_jax.report.judged import flat, judged
from lora_dpo_jax.report.pictures import HOW_TO_INSTALL, can_draw, picture
from lora_dpo_jax.report.run_files import RunFiles, read_run
from lora_dpo_jax.report.statistics import accuracy, comparisons_in, likelier_response, longer_response
from lora_dpo_jax.report.tints import cut, tinted
from lora_dpo_jax.report.verdict import typical, verdict_of

REPORT = "report.html"
GENERATOR = "lora_dpo_jax"  # of pages that may be replaced
HERE = Path(__file__).parent

# Settings that a reader looks for first. The whole file follows.
MAIN_SETTINGS = (
    "initialize_from_hf",
    "initialize_from_peft",
    "loss.type",
    "loss.beta",
    "lora.r",
    "lora.alpha",
    "lora.target_modules",
    "optimizer.type",
    "optimizer.learning_rate",
    "optimizer.lr_schedule",
    "optimizer.warmup",
    "trainer.train_batch_size",
    "trainer.num_train_steps",
    "trainer.num_train_epochs",
    "train_seq_len",
    "trainer.seed",
    "trainer.mp",
    "model.quantization",
)
OUTPUTS = {
    "adapter": "peft_save_path",
    "merged model": "merged_hf_save_path",
    "adapter for llama.cpp": "gguf_save_path",
}


def write_report(folder: Path) -> Path:
    """Writes the report of the run in `folder` there. Returns its path."""
    write_page(folder / REPORT, report_page(read_run(folder)))
    return folder / REPORT


def write_page(path: Path, page: str) -> None:
    replace_file(path, page.encode("utf-8", "backslashreplace"))


def report_page(run: RunFiles) -> str:
    held_out, settings = run.record.held_out, flat(run.settings)
    groups = {
        "curves": charts.curves(run, charts.CURVES) + charts.curves(run, charts.BY_LENGTH),
        "speed": charts.curves(run, charts.SPEED),
        "others": charts.other_curves(run),
        "held_out": [] if held_out is None else charts.held_out_charts(held_out),
    }
    return render(
        "report.html.jinja",
        run=run,
        verdict=verdict_of(run),
        charts={name: [drawn(chart) for chart in group] for name, group in groups.items()},
        outputs=_outputs(run),
        baselines=_accuracies(run),
        pairs={"right": tinted(run.record.most_right), "wrong": tinted(run.record.most_wrong)},
        completions=_completions(run),
        judges=[judged(files) for files in run.judges],
        speed=_speed(run),
        settings=[(path, settings[path]) for path in MAIN_SETTINGS if settings.get(path, "null") != "null"],
        adapter=run.setting("peft_save_path"),
        base=run.setting("initialize_from_hf"),
        example=f"[{json.dumps(run.record.prompts[0] if run.record.prompts else 'Hello!')}]",
    )


def drawn(chart: Chart) -> dict[str, Any]:
    """A chart with its picture; the picture is None without matplotlib."""
    return {"chart": chart, "picture": picture(chart, chart.key) if can_draw() else None}


def render(template: str, **content: Any) -> str:
    """A page from one of the templates beside this file. Texts are escaped, and their control characters shown."""
    environment = Environment(
        loader=FileSystemLoader(HERE, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {"python": lambda text: repr(str(text)), "shell": lambda text: shlex.quote(str(text))}
    return environment.get_template(template).render(
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        generator=GENERATOR,
        version=lora_dpo_jax.__version__,
        can_draw=can_draw(),
        how_to_install=HOW_TO_INSTALL,
        **content,
    )


def is_our_page(path: Path) -> bool:
    """Whether a file is such a page, which may be replaced."""
    with path.open("rb") as file:
        return f'<meta name="generator" content="{GENERATOR}'.encode() in file.read(2000)


def _shown(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _outputs(run: RunFiles) -> list[tuple[str, str]]:
    exported = [(title, path) for title, setting in OUTPUTS.items() if (path := run.setting(setting)) is not None]
    return [*exported, ("run's folder: metrics, settings, checkpoints", str(run.folder.resolve()))]


def _accuracies(run: RunFiles) -> Table | None:
    """Held-out accuracy before and after, overall and where the longer response is chosen or not, with baselines."""
    held_out = run.record.held_out
    if held_out is None or held_out.after is None:
        return None
    longer = comparisons_in(held_out).excess
    groups = {
        "all": None,
        "the chosen response is longer": longer > 0,
        "the rejected response is longer": longer < 0,
        "both are as long": longer == 0,
    }
    rows = []
    for title, where in groups.items():
        after, before = (accuracy(held_out, moment, where) for moment in (held_out.after, held_out.before))
        if after is not None:
            rows.append([title, f"{after.count:,}", _with_error(before), _with_error(after)])
    for title, found in (
        ("baseline: the longer response", longer_response(held_out)),
        ("baseline: what the untrained model finds likelier", likelier_response(held_out)),
    ):
        if found is not None:
            rows.append([title, f"{found.count:,}", _with_error(found), ""])
    return Table("Accuracy on held-out comparisons, ± standard error", ["", "count", "before", "after"], rows)


def _with_error(found: Any) -> str:
    if found is None:
        return "unknown"
    # Where all are alike, as with ties or a few easy comparisons, the error says nothing.
    return f"{percent(found.mean)} ±\u00a0{percent(found.error)}" if found.error > 0 else percent(found.mean)


def _completions(run: RunFiles) -> list[dict[str, str | None]]:
    record = run.record
    moments = {"before": record.completed_before, "after": record.completed_after}
    texts = {name: moment.texts if moment is not None else [] for name, moment in moments.items()}

    def of(name: str, index: int) -> str | None:
        return cut(texts[name][index]) if index < len(texts[name]) else None

    if not any(texts.values()):
        return []
    return [
        {"prompt": cut(prompt), "before": of("before", i), "after": of("after", i)}
        for i, prompt in enumerate(record.prompts)
    ]


def _speed(run: RunFiles) -> Table:
    rows = []
    if (first := run.series("seconds_to_first_step")) is not None:
        rows.append(["until the first step was done, with reading and compiling", f"{number(first.last, 3)} s"])
    for name in ("pairs", "answers", "examples", "tokens"):
        if (speed := typical(run.series(f"train/{name}_per_second"))) is not None:
            rows.append([f"{name} per second, the middle one of all logged steps", number(speed, 3)])
    if (padding := typical(run.series("train/padding_fraction"))) is not None:
        rows.append(["padding, of all tokens in rows", percent(padding)])
    if (facts := run.record.facts) is not None:
        rows.append(["rows of a micro-batch x tokens", facts.rows])
        rows.append(["devices", facts.devices])
        rows.append(["processes", f"{facts.processes:,}"])
    return Table("Speed", ["", ""], rows)
