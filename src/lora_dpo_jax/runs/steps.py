"""The pairs that each step of a run trains on, and the shapes of their rows."""

import json
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_dpo_jax.data.batches import packed_batches
from lora_dpo_jax.data.order import ExampleOrder, StepIds
from lora_dpo_jax.data.packing import PreferenceBatch
from lora_dpo_jax.data.shapes import PackingConfig, StepShapes, choose_shapes
from lora_dpo_jax.data.table import ExampleTable
from lora_dpo_jax.sharding import Placement

MOST_STEPS = 4096
TOKENS_AT_ONCE = 16_384  # of a device, if per_device_parallelism is -1; more make no device faster


@dataclass(frozen=True)
class Steps:
    """The pairs of each step, and the shapes of the rows that they are laid into."""

    pairs: ExampleTable
    ids: Sequence[np.ndarray]  # of each step: the ids of its pairs
    shapes: StepShapes

    def __len__(self) -> int:
        return len(self.ids)

    def batches(
        self,
        placement: Placement,
        *,
        steps: Iterable[int] | None = None,
        reference: np.ndarray | None = None,
        columns: Sequence[str] = (),
    ) -> Generator[tuple[PreferenceBatch, ...], None, None]:
        """The batches of `steps` (None: of all) on their devices. `reference` and `columns`: see `packed_batches`."""
        ids, place = (self.ids[step] for step in (range(len(self)) if steps is None else steps)), placement.put_batch
        return packed_batches(self.pairs, ids, self.shapes, place=place, reference=reference, columns=columns)

    def first_visits(self, wanted: np.ndarray) -> Iterator[int]:
        """The steps that visit an example for the first time that is `wanted` (bool [example]), in order."""
        left = wanted.copy()
        remaining = int(left.sum())
        for step in range(len(self)):
            if not remaining:
                return
            ids = np.unique(self.ids[step])
            if new := int(left[ids].sum()):
                left[ids] = False
                remaining -= new
                yield step

    def number_of_rows(self, step: int, placement: Placement) -> int:
        """A number from 1 to 2**32 - 1 for the rows of a step: their examples, shapes and devices.

        Steps with the same number compute the same sums in the same order.
        """
        ids, pairs = self.ids[step], self.pairs
        laid_out = self.shapes.laid_out(ids, pairs.sizes[ids])
        rows = [(repr(part), [[pairs.identity(int(i)) for i in row] for row in of_part]) for part, of_part in laid_out]
        text = json.dumps([dict(placement.mesh.shape), self.shapes.packing.share_prefix, rows])
        return max(1, zlib.crc32(text.encode()))


def lay_out_steps(
    pairs: ExampleTable,
    ids: Sequence[np.ndarray],
    layout: PackingConfig,
    *,
    parallelism: int,
    row_shards: int,
    shape_tokens: float = 0.0,
) -> Steps:
    """Chooses the shapes of rows. `parallelism` is trainer.per_device_parallelism, `row_shards` Placement's.

    All steps together must save `shape_tokens` by another shape: see `choose_shapes`. Of a long run, MOST_STEPS are
    looked at. A later step that needs larger shapes gets them when it is packed.
    """
    longest_row = row_bound(parallelism, layout.shortest_row(pairs.sizes))
    looked_at = ids.spread(MOST_STEPS) if isinstance(ids, StepIds) else ids
    shapes = choose_shapes(
        looked_at,
        pairs.sizes,
        row_multiple=row_shards,
        longest_row=longest_row,
        packing=layout,
        shape_tokens=shape_tokens * len(looked_at) / len(ids),
    )
    return Steps(pairs, ids, shapes)


def row_bound(parallelism: int, longest_pair: int) -> int:
    """The tokens that a device computes at once, at most."""
    return max(longest_pair, TOKENS_AT_ONCE) if parallelism == -1 else parallelism * longest_pair


def pair_order(pairs: ExampleTable, *, seed: int, shuffle: bool, weights: Mapping[str, float] | None) -> ExampleOrder:
    """The order in which a run visits its pairs. `weights` is data.train_weights, by component.

    Raises ValueError if a component with a weight has no pairs left.
    """
    if weights is None:
        return ExampleOrder(tuple(pairs.counts), seed, shuffle)
    for name, size in zip(pairs.names, pairs.counts, strict=True):
        if weights[name] > 0 and size == 0:
            raise ValueError(
                f"data.train_weights.{name}={weights[name]}, but all pairs of {name} are held out: lower "
                "validation_split_fraction, give a component validation data, or set this weight to 0"
            )
    return ExampleOrder(tuple(pairs.counts), seed, shuffle, tuple(weights[name] for name in pairs.names))
