"""What a judge found, from the judge.json that `main.judge` writes; of other files, whatever can stand in a table."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_dpo_jax.json_objects import is_number
from lora_dpo_jax.report.charts import Table, percent
from lora_dpo_jax.report.run_files import JudgeFiles
from lora_dpo_jax.report.tints import cut

# Rates of a summary, by their keys: how they are called here.
RATES = {
    "win_rate": "win rate, of prompts on which both orders agree",
    "length_controlled_win_rate": "win rate at equal length",
    "prefers_first": "how often the judge prefers the first place",
}
OUTCOMES = ("win", "loss", "tie", "inconsistent", "unparsed")


@dataclass(frozen=True)
class Judged:
    """The findings of one file, in words and as a table."""

    name: str  # of the file
    words: str
    table: Table
    others: dict[str, str]  # everything else in the file, by dotted path
    examples: list[dict[str, str]]  # some prompts, with both answers, the outcome and the judge's reasons


def judged(files: JudgeFiles) -> Judged:
    name, values, examples = files.name, files.summary, [_example(result) for result in files.results]
    if not isinstance(values.get("win_rate"), dict):
        return Judged(name, "", Table(name, [], []), flat(values), examples)
    rows = []
    of_outcomes, counts = values.get("rates"), values.get("counts")
    for outcome in OUTCOMES:
        count = counts.get(outcome) if isinstance(counts, dict) else None
        if isinstance(of_outcomes, dict) and outcome in of_outcomes and (count or outcome != "unparsed"):
            rows.append([outcome, _rate(of_outcomes[outcome]), _interval(of_outcomes[outcome]), _whole(count)])
    rows += [[title, _rate(values[key]), _interval(values[key]), ""] for key, title in RATES.items() if key in values]
    table = Table("What the judge preferred, with 95% intervals", ["", "share", "interval", "prompts"], rows)
    shown = (*RATES, "rates", "counts", "settings")
    others = flat({key: value for key, value in values.items() if key not in shown})
    return Judged(name, _in_words(values, values["win_rate"]), table, others, examples)


def _example(result: Mapping[str, Any]) -> dict[str, str]:
    reasons = result.get("reasons")
    places = zip(("candidate first", "baseline first"), reasons if isinstance(reasons, list) else [], strict=False)
    told = [f"{place}: {reason}" for place, reason in places if reason]
    texts = {name: result.get(name) for name in ("prompt", "candidate", "baseline", "outcome")}
    shown = {name: text if isinstance(text, str) else json.dumps(text) for name, text in texts.items()}
    return {**{name: cut(text) for name, text in shown.items()}, "reasons": cut("; ".join(told))}


def _in_words(values: Mapping[str, Any], win_rate: Any) -> str:
    share, interval = _rate(win_rate), _interval(win_rate)
    found = f"in {share}" if share != "undefined" else "in an undefined share"
    found += f" (95% interval {interval})" if interval else ""
    counts = values.get("counts")
    agreed: list[Any] = [counts.get(name) for name in ("win", "loss", "tie")] if isinstance(counts, dict) else []
    of = f" ({sum(agreed):,} of {_whole(values.get('prompts'))})" if agreed and all(map(is_number, agreed)) else ""
    why = win_rate.get("why")
    note = f"{why[:1].upper()}{why[1:]}." if isinstance(why, str) and why else "A tie counts as half."
    return (
        f"The judge preferred the candidate's answer to the baseline's {found} of the prompts on which both orders "
        f"agree{of}. {note}"
    )


def _rate(rate: Any) -> str:
    value = rate.get("value") if isinstance(rate, dict) else None
    return percent(value) if is_number(value) else "undefined"


def _interval(rate: Any) -> str:
    ends = [rate.get("low"), rate.get("high")] if isinstance(rate, dict) else []
    return " to ".join(map(percent, ends)) if ends and all(map(is_number, ends)) else ""


def _whole(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def flat(values: Any, path: str = "") -> dict[str, str]:
    """Nested mappings as one: a text for each number or text, by its dotted path. Long lists are left out."""
    if isinstance(values, Mapping):
        return {k: v for name, value in values.items() for k, v in flat(value, f"{path}.{name}".lstrip(".")).items()}
    if isinstance(values, list):
        is_short = len(values) <= 4 and not any(isinstance(value, Mapping | list) for value in values)
        return {path: ", ".join(map(_text, values))} if is_short else {}
    return {path: _text(values)}


def _text(value: Any) -> str:
    """As YAML has it, but with fewer digits."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return f"{value:.6g}" if isinstance(value, float) else str(value)
