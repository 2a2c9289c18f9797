"""Which of two systems answers better: completes prompts with both, and asks a judge in both orders.

python -m lora_dpo_jax.main.judge --config_path config/quickstart.yaml --judge.type reward --output out/judge
"""

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import draccus
import jax
from tqdm import tqdm

from lora_dpo_jax import __version__
from lora_dpo_jax.data.config import ComponentConfig, PreferenceDataConfig
from lora_dpo_jax.files import cache_folder, replace_file
from lora_dpo_jax.judging.comparison import Comparison, Result, compare
from lora_dpo_jax.judging.interface import RunModels, Usage
from lora_dpo_jax.judging.judges import JudgeConfig
from lora_dpo_jax.judging.verdict_file import VerdictFile
from lora_dpo_jax.main.command import command
from lora_dpo_jax.main.output_file import check_output, write_output
from lora_dpo_jax.places import is_url, refuse_impossible_paths
from lora_dpo_jax.printable import printable
from lora_dpo_jax.redaction import redacted
from lora_dpo_jax.runs.compiled_programs import keep_compiled_programs
from lora_dpo_jax.runs.completions import LINE, completion_prompts, completions_of
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.runs.outputs import check_writable
from lora_dpo_jax.runs.prompts import Prompt, choose_prompts, file_prompts, refuse_duplicates
from lora_dpo_jax.runs.row_prompts import row_prompts
from lora_dpo_jax.runs.systems import SystemConfig
from lora_dpo_jax.settings.arguments import parse_arguments

logger = logging.getLogger("lora_dpo_jax")

# In the folder `output`, beside the completions of models: candidate.jsonl and baseline.jsonl.
VERDICTS, RESULTS, SUMMARY = "verdicts.jsonl", "results.jsonl", "judge.json"
RESULT = tuple(field.name for field in dataclasses.fields(Result))
MARKS = {"candidate", "baseline", "judge", "rates"}  # keys of a summary


@dataclass(frozen=True)
class NoData(PreferenceDataConfig):
    """No rows: the prompts come from elsewhere."""

    components: dict[str, ComponentConfig] = field(default_factory=dict)  # by name; none: give the prompts otherwise

    def __post_init__(self):
        pass


@dataclass(frozen=True, kw_only=True)
class JudgingConfig(TrainConfig):
    """Two systems, prompts and a judge. Inherits the settings of a run, which say what is not given here."""

    # Not needed if prompts_file and the models of both systems are given.
    data: PreferenceDataConfig = field(default_factory=NoData)
    initialize_from_hf: str = ""  # the base of both systems, unless they have models of their own

    judge: JudgeConfig  # who judges
    candidate: SystemConfig = field(default_factory=SystemConfig)  # by default the run's adapter, at peft_save_path
    baseline: SystemConfig = field(default_factory=SystemConfig)  # by default the base
    prompts_file: str | None = None  # .txt or .jsonl, as of generate; null: the run's held-out prompts
    count: int | None = 50  # of the prompts, drawn at random; null: all
    seed: int = 0  # of the drawn prompts, and of the samples that give the intervals
    output: str | None = None  # the folder to write; null: `judge` in the folder of the run that trainer.id names

    if_missing: ClassVar = {"judge": "Choose who judges: --judge.type reward; or local or openai, with --judge.model"}

    def __post_init__(self):
        super().__post_init__()
        refuse_impossible_paths({"output": self.output, "prompts_file": self.prompts_file})
        if self.count is not None and self.count < 1:
            raise ValueError(f"count={self.count} must be at least 1, or null for all prompts")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be in [0, 2**32)")
        if self.output is None and self.trainer.id is None:
            raise ValueError("output is missing; it must be the folder to write, such as out/judge")
        if is_url(self.folder):
            raise ValueError(f"output={self.output!r} must be a folder of this machine")

    @property
    def folder(self) -> str:
        return self.output or str(self.trainer.run_dir(self.trainer.id or "") / "judge")

    @property
    def systems(self) -> dict[str, SystemConfig]:
        """Candidate and baseline, with the run's models for what is not given. Raises ValueError if they lack one."""
        return {
            "candidate": self._completed("candidate", self.candidate, self.peft_save_path),
            "baseline": self._completed("baseline", self.baseline, None),
        }

    def _completed(self, name: str, system: SystemConfig, adapter: str | None) -> SystemConfig:
        """`adapter`: the default of a system of which nothing is given."""
        if system.completions_file is not None or system.model is not None:
            return system
        if not self.initialize_from_hf:
            raise ValueError(f"{name} is missing: set {name}.model or {name}.completions_file")
        if name == "candidate" and system.adapter is None:
            if adapter is None:
                raise ValueError(
                    "candidate is missing: set candidate.adapter, candidate.model or candidate.completions_file, or "
                    "peft_save_path to the adapter of a run"
                )
            if not is_url(adapter) and not Path(adapter).expanduser().exists():
                raise FileNotFoundError(
                    f"candidate: the run has exported no adapter yet, there is no peft_save_path={adapter!r}. Train "
                    "first, or set candidate.adapter"
                )
        return dataclasses.replace(
            system,
            model=self.initialize_from_hf,
            revision=self.hf_revision,
            adapter=system.adapter or adapter,
            quantization=system.quantization or self.model.quantization,
        )

    @property
    def models(self) -> RunModels:
        return RunModels(
            base=self.initialize_from_hf or None,
            revision=self.hf_revision,
            adapter=self.peft_save_path,
            quantization=self.model.quantization,
            beta=self.preference_loss.beta,
            cache=cache_folder(self.data.cache_dir),
        )


def main(config: JudgingConfig) -> dict[str, Any]:
    """Judges, prints the rates, writes them to `judge.json` in the folder `output`, and returns what is in it."""
    began = time.perf_counter()
    systems, folder, models = config.systems, Path(config.folder).expanduser(), config.models
    if jax.process_count() > 1:
        raise ValueError(f"judging takes one process; found {jax.process_count()}")
    _check_output(config, folder)
    keep_compiled_programs(config.trainer.jax_compilation_cache_dir, models.cache)
    config.judge.check(models)
    prompts = _prompts(config)
    with VerdictFile(folder / VERDICTS) as file:
        memory = models.cache / "digests"
        answers = completions_of(systems, prompts, config.generation, folder=folder, memory=memory)
        _warn(systems, answers)
        completion_seconds = time.perf_counter() - began
        judge = config.judge.start(models)
        with _saying_what_is_kept(file):
            found = compare(judge, prompts, *answers.values(), file=file, seed=config.seed, progress=_progress)
    write_output(str(folder / RESULTS), (dict(vars(result)) for result in found.results))
    summary = {
        **{name: dataclasses.asdict(system) for name, system in systems.items()},
        "judge": redacted(dict(judge.identity)),
        **found.as_json(),
        "cost": config.judge.cost(found.usage),
        "completion_seconds": completion_seconds,
        "files": {"results": RESULTS, "verdicts": VERDICTS},
        "settings": _settings(config),
        "version": __version__,
    }
    replace_file(folder / SUMMARY, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
    print("\n".join(map(printable, report(config, found, completion_seconds))))
    return summary


def report(config: JudgingConfig, found: Comparison, completion_seconds: float) -> list[str]:
    """The lines for people."""
    rates, lengths, cost = found.rates, found.mean_characters, config.judge.cost(found.usage)
    agreed = sum(rates.counts[name] for name in ("win", "loss", "tie"))
    same = f", of which {found.identical:,} have the same answer twice" if found.identical else ""
    lines = [
        f"{len(found.results):,} prompts, each judged in both orders{same}",
        *(f"{name:<18}{rate}" for name, rate in rates.rates.items() if name != "unparsed" or rates.counts[name]),
        f"{'win rate':<18}{rates.win_rate}",
        f"{'':<18}of the {agreed:,} prompts on which both orders agree; a tie counts as half",
        f"{'length-controlled':<18}{rates.length_controlled_win_rate}",
        f"{'mean length':<18}candidate {lengths['candidate']:,.0f} characters, baseline {lengths['baseline']:,.0f}",
        f"{'prefers first':<18}{rates.prefers_first}",
        f"{'':<18}of the judge's verdicts; 50% is no preference for a place",
    ]
    if found.usage != Usage():
        tokens = f"{found.usage.prompt_tokens:,} read, {found.usage.completion_tokens:,} written"
        lines.append(f"{'tokens':<18}{tokens}" + ("" if cost is None else f"; cost {cost:,.4f}"))
    return [
        *lines,
        f"{'verdicts':<18}{found.asked:,} asked, {found.from_file:,} known before",
        f"{'time':<18}{completion_seconds:.1f} s until both systems had answered, {found.seconds:.1f} s of judging",
        f"{'files':<18}{config.folder}: {SUMMARY}, {RESULTS}, {VERDICTS}",
    ]


def _prompts(config: JudgingConfig) -> list[Prompt]:
    """The prompts that are judged, each once."""
    files = {name: file for name in ("candidate", "baseline") if (file := getattr(config, name).completions_file)}
    if config.prompts_file is not None:
        prompts = file_prompts(config.prompts_file)
        refuse_duplicates(prompts)
    elif config.data.components:
        prompts = row_prompts(config)
    elif files:
        name, file = next(iter(files.items()))
        prompts = completion_prompts(f"{name}.completions_file", file)
        refuse_duplicates(prompts)
    else:
        raise ValueError("there are no prompts: set prompts_file, or data.components with held-out rows")
    chosen = choose_prompts(prompts, config.count, config.seed)
    logger.info("judging %s of %s prompts", f"{len(chosen):,}", f"{len(prompts):,}")
    return chosen


def _warn(systems: Mapping[str, SystemConfig], answers: Mapping[str, Sequence[str]]) -> None:
    if systems["candidate"] == systems["baseline"]:
        logger.warning("candidate and baseline are the same system, so nothing is compared")
    elif answers["candidate"] == answers["baseline"]:
        logger.warning("candidate and baseline give the same answer to each prompt, so the judge is asked nothing")
    for name, texts in answers.items():
        if empty := sum(not text.strip() for text in texts):
            logger.warning("%s: %s of %s answers are empty", name, f"{empty:,}", f"{len(texts):,}")


def _check_output(config: JudgingConfig, folder: Path) -> None:
    """Raises OSError if the folder cannot be written, or if that would replace inputs or other files."""
    check_writable("output", folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output={str(folder)!r} is a file; name a folder")
    inputs = {"prompts_file": config.prompts_file}
    inputs |= {f"{name}.completions_file": getattr(config, name).completions_file for name in ("candidate", "baseline")}
    written = [f"{name}.jsonl" for name in ("candidate", "baseline") if inputs[f"{name}.completions_file"] is None]
    given = {setting: [file] for setting, file in inputs.items() if file is not None}
    for name in (*written, RESULTS):
        check_output(str(folder / name), lines=[LINE, RESULT], inputs=given)
    summary = folder / SUMMARY
    if summary.exists():
        try:
            is_ours = MARKS <= set(json.loads(summary.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            is_ours = False
        if not is_ours:
            raise FileExistsError(
                f"output={str(folder)!r}: {summary} is not what this command writes, so it is not replaced. Choose "
                "another folder"
            )


@contextmanager
def _saying_what_is_kept(file: VerdictFile) -> Iterator[None]:
    """Adds to errors of judges that the verdicts so far are kept."""
    try:
        yield
    except (OSError, ValueError, KeyboardInterrupt) as error:
        kept = f"{len(file):,} verdicts are kept in {file.path}; the same command asks only for the others"
        if isinstance(error, KeyboardInterrupt):
            print(printable(f"stopped: {kept}"), file=sys.stderr)
            raise SystemExit(130) from error
        if not len(file):
            raise
        raise (OSError if isinstance(error, OSError) else ValueError)(f"{error}. {kept}") from error


def _progress(verdicts: Iterable[Any], total: int) -> Iterable[Any]:
    return tqdm(verdicts, "judging", total=total, unit=" verdicts", disable=not sys.stderr.isatty())


def _settings(config: JudgingConfig) -> dict[str, Any]:
    """As plain values without secrets."""
    encode: Any = draccus.encode
    return redacted(encode(config))


def run() -> None:
    """The command `lora-dpo-judge`."""
    with command(lambda: parse_arguments(JudgingConfig), lambda config: config.trainer.distributed) as config:
        main(config)


if __name__ == "__main__":
    run()
