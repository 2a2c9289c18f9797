"""How much of the rows that a run computes is padding, over one epoch of a file of preferences:

    python -m bench.padding --data train.jsonl.gz --tokenizer MODEL_FOLDER --train_seq_len 2048

Packs each step as a run would, for several numbers of pairs a step. No model is needed.
"""

from dataclasses import dataclass, field
from typing import Any

from bench import pairs as benchmark_pairs
from bench.measure import emit
from lora_dpo_jax.data import PairLayout, PairOrder, PairTable
from lora_dpo_jax.runs.setup import layout_of_run
from lora_dpo_jax.settings.arguments import parse


@dataclass(frozen=True)
class Options:
    data: str
    tokenizer: str
    train_seq_len: int = 2048
    batch_sizes: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    per_device_parallelism: int = -1
    devices: int = 1
    layout: PairLayout = field(default_factory=PairLayout)
    out: str | None = None


def main() -> None:
    options = parse(Options)
    pairs = benchmark_pairs.whole_file(options.data, options.tokenizer, options.train_seq_len)
    rows = [measure(pairs, options, batch_size) for batch_size in options.batch_sizes]
    print(markdown(rows))
    emit({"data": options.data, "train_seq_len": options.train_seq_len, "pairs": len(pairs), "rows": rows}, options.out)


def measure(pairs: PairTable, options: Options, batch_size: int) -> dict[str, Any]:
    """One epoch, without the last step if it is not full."""
    order = PairOrder(tuple(pairs.sizes), seed=0)
    batches = [order.batch(step, batch_size) for step in range(len(pairs) // batch_size)]
    parallelism = options.per_device_parallelism
    layout = layout_of_run(pairs, batches, parallelism, options.layout, row_shards=options.devices)
    real = computed = 0
    for ids in batches:
        real += int(pairs.lengths[ids].sum())
        for part, rows in zip(layout.parts, layout.plan(pairs.lengths[ids]), strict=True):
            micro_batches = -(-len(rows) // part.rows)
            computed += micro_batches * part.rows * part.row_length
    return {
        "pairs_per_step": batch_size,
        "shapes": [f"{part.rows} x {part.row_length}" for part in layout.parts],
        "padding_fraction": 1 - real / computed,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| pairs a step | rows x tokens | padding |", "|---|---|---|"]
    for row in rows:
        shapes = ", ".join(row["shapes"])
        lines.append(f"| {row['pairs_per_step']} | {shapes} | {row['padding_fraction']:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
