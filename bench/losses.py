"""What a step of each loss takes, next to one of `sigmoid`, on the same tokens:

    python -m bench.losses --shape 22m --data uf512 --trainer.train_batch_size 4 --rounds 9

All are compiled first, in one process. Then each takes a step in its turn; the table has medians over the rounds, and
the ratio is the median of those to the step of `sigmoid` in the same round. Settings are `bench.throughput`'s, with the
reference cached, but for `ld_alpha`, which needs it in every step.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

from bench import wiring
from bench.measure import emit
from bench.throughput import load_examples
from bench.wiring import wire
from lora_dpo_jax.columns import LABEL, MISMATCHED, WEIGHT
from lora_dpo_jax.data import ExampleTable, MemoryExamples, TokenizedExample, whole_table
from lora_dpo_jax.losses import LOSSES, Loss, Mix
from lora_dpo_jax.settings.arguments import parse

BASELINE = "sigmoid"


@dataclass(frozen=True)
class Options(wiring.Options):
    losses: list[str] = field(default_factory=list)  # of `variants`; empty: all
    rounds: int = 9


def variants() -> dict[str, dict[str, Any]]:
    """By name: the changes of settings of `wiring.Options` that are measured."""
    made: dict[str, dict[str, Any]] = {BASELINE: {}}
    for name, kind in LOSSES.items():
        if kind is Mix:
            mpo = [_loss(part) for part in ("sigmoid", "bco_pair", "sft")]
            made["mix (MPO)"] = {"loss": Mix(losses=mpo, weights=[0.8, 0.2, 1.0])}
        else:
            made[name] = {"loss": _loss(name)}
    made["sigmoid, use_weighting"] = {"loss": _loss("sigmoid", use_weighting=True)}
    made["sigmoid, live"] = {"reference": "live"}
    made["sigmoid, live, ld_alpha"] = {"reference": "live", "loss": _loss("sigmoid", ld_alpha=0.5)}
    made["sigmoid, token_metrics"] = {"trainer.token_metrics": True}
    return made


def main() -> None:
    options = parse(Options)
    chosen = {name: variants()[name] for name in dict.fromkeys([BASELINE, *(options.losses or variants())])}
    steps = {name: _steps(options, change) for name, change in chosen.items()}
    for taken in steps.values():
        next(taken)
    rounds = [{name: next(taken) for name, taken in steps.items()} for _ in range(options.rounds)]
    rows = [_row(name, rounds) for name in steps]
    print(markdown(rows))
    emit({"shape": options.shape, "data": options.data, "rounds": options.rounds, "rows": rows}, options.out)


def _steps(options: Options, change: dict[str, Any]) -> Iterator[tuple[float, float]]:
    """Seconds and processor seconds of one step after the other; the first is compiled and warm when it begins."""
    change = dict(change)
    trainer = dataclasses.replace(options.trainer, token_metrics=change.pop("trainer.token_metrics", False))
    settings = dataclasses.replace(options, trainer=trainer, warmup=1, steps=options.rounds + 1, **change)
    table = load_examples(settings)
    if LABEL in settings.loss.all_columns:
        table = labelled(table, mismatched=settings.loss.needs_mismatched)
    run = wire(settings, table)
    columns = settings.loss.columns_in(table.arrays.columns)
    batch = next(run.steps.batches(run.learner.placement, reference=run.reference, columns=columns))
    while True:
        began = time.perf_counter(), time.process_time()
        jax.block_until_ready((run.learner(batch), run.learner.state))
        yield time.perf_counter() - began[0], time.process_time() - began[1]


def labelled(pairs: ExampleTable, *, mismatched: bool) -> ExampleTable:
    """The same tokens as answers with labels. `mismatched`: the second response is one to another prompt."""
    other = MISMATCHED if mismatched else 1
    examples = [
        TokenizedExample(pair.prompt, pair.responses, columns={LABEL: [number % 2, other], WEIGHT: 1.0})
        for number, pair in enumerate(pairs)
    ]
    return whole_table({"answers": MemoryExamples(examples)})


def _loss(name: str, **settings: Any) -> Loss:
    needed = {"label_smoothing": 0.01} if name == "exo_pair" else {}
    return LOSSES[name](**needed, **settings)


def _row(name: str, rounds: list[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    wall, processor = zip(*(taken[name] for taken in rounds), strict=True)
    ratios = [statistics.median(taken[name][of] / taken[BASELINE][of] for taken in rounds) for of in (0, 1)]
    return {
        "loss": name,
        "seconds": round(statistics.median(wall), 4),
        "ratio": round(ratios[0], 3),
        "cpu_seconds": round(statistics.median(processor), 4),
        "cpu_ratio": round(ratios[1], 3),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| loss | s/step | ratio | CPU s/step | ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| {' | '.join(f'{value:.3f}' if isinstance(value, float) else f'`{value}`' for value in row.values())} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
