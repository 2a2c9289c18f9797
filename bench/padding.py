"""How much of the rows that a run computes is padding, over one epoch of a file of preferences:

    python -m bench.padding --data train.jsonl.gz --tokenizer MODEL_FOLDER --train_seq_len 2048

Packs each step as a run would, for several numbers of pairs a step. No model is needed.
"""

from dataclasses import dataclass, field
from typing import Any

from bench import pairs as benchmark_pairs
from bench.measure import emit
from lora_dpo_jax.data import ExampleOrder, ExampleTable, PackingConfig
from lora_dpo_jax.runs.steps import lay_out_steps
from lora_dpo_jax.settings.arguments import parse


@dataclass(frozen=True)
class Options:
    data: str
    tokenizer: str
    train_seq_len: int = 2048
    batch_sizes: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    per_device_parallelism: int = -1
    devices: int = 1
    layout: PackingConfig = field(default_factory=PackingConfig)
    out: str | None = None


def main() -> None:
    options = parse(Options)
    pairs = benchmark_pairs.whole_file(options.data, options.tokenizer, options.train_seq_len)
    rows = [measure(pairs, options, batch_size) for batch_size in options.batch_sizes]
    print(markdown(rows))
    emit({"data": options.data, "train_seq_len": options.train_seq_len, "pairs": len(pairs), "rows": rows}, options.out)


def measure(pairs: ExampleTable, options: Options, batch_size: int) -> dict[str, Any]:
    """One epoch, without the last step if it is not full."""
    order = ExampleOrder(tuple(pairs.counts), seed=0)
    batches = [order.batch(step, batch_size) for step in range(len(pairs) // batch_size)]
    parallelism, row_shards = options.per_device_parallelism, options.devices
    shapes = lay_out_steps(pairs, batches, options.layout, parallelism=parallelism, row_shards=row_shards).shapes
    real = computed = 0
    for ids in batches:
        real += int(pairs.sizes.tokens[ids].sum())
        for part, rows in zip(shapes.parts, shapes.rows_of(pairs.sizes[ids]), strict=True):
            micro_batches = -(-len(rows) // part.rows)
            computed += micro_batches * part.rows * part.row_length
    return {
        "pairs_per_step": batch_size,
        "shapes": [f"{part.rows} x {part.row_length}" for part in shapes.parts],
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
