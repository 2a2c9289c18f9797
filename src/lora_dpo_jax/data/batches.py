"""From a table of examples to packed batches, made ahead of the device."""

import functools
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from lora_dpo_jax.data.packing import PreferenceBatch, pack
from lora_dpo_jax.data.shapes import PackingConfig, StepShapes, fill_rows, shape_of_rows
from lora_dpo_jax.data.table import ExampleTable

T = TypeVar("T")


def packed_batches(
    examples: ExampleTable,
    batches: Iterable[np.ndarray],
    shapes: StepShapes,
    *,
    place: Callable,
    reference: np.ndarray | None = None,
    columns: Sequence[str] | None = None,
    ahead: int = 2,
) -> Generator[tuple[PreferenceBatch, ...], None, None]:
    """Packs `batches` (arrays of example ids) and puts them on the devices with `place`.

    A thread does this, up to `ahead` batches before their use. Yields the parts of each batch, one for each shape.
    `reference`, float32 [response of the table], is log p under the reference in nats, if it is known. The batches
    include the table's `columns`, by default all of them.
    """
    known = None if reference is None else examples.arrays.by_example(reference)
    names = examples.arrays.columns if columns is None else columns
    per_response = {name: examples.arrays.columns[name].per_response for name in names}

    def make(ids: np.ndarray) -> tuple[PreferenceBatch, ...]:
        share_prefix = shapes.packing.share_prefix
        laid_out = shapes.laid_out(ids, examples.sizes[ids])
        return place(
            tuple(
                pack(examples, rows, part, known, share_prefix=share_prefix, columns=per_response)
                for part, rows in laid_out
            )
        )

    return prefetch((functools.partial(make, ids) for ids in batches), ahead)


def packed_rows(
    examples: ExampleTable, *, rows: int, place: Callable, columns: Sequence[str] = (), ahead: int = 2
) -> tuple[int, Iterator[PreferenceBatch]]:
    """(number of batches, batches): all examples once, packed as tightly as possible.

    Each batch is one micro-batch of `rows` rows. For passes in which it does not matter which examples share a batch.
    """
    sizes = examples.sizes
    longest = PackingConfig().shortest_row(sizes)
    filled = [np.array(row) for row in fill_rows(sizes.tokens.tolist(), longest)]
    shape = shape_of_rows(filled, sizes, rows=rows)
    batches = [filled[i : i + rows] for i in range(0, len(filled), rows)]
    per_response = {name: examples.arrays.columns[name].per_response for name in columns}

    def make(batch: list[np.ndarray]) -> PreferenceBatch:
        return place(pack(examples, batch, shape, columns=per_response))

    jobs = (functools.partial(make, batch) for batch in batches)
    return len(batches), prefetch(jobs, ahead)


def prefetch(jobs: Iterator[Callable[[], T]], ahead: int) -> Generator[T, None, None]:
    """The results of `jobs` in order. A thread computes up to `ahead` results before their use.

    Closing the generator ends the thread.
    """
    is_finalizing = sys.is_finalizing  # when the interpreter exits, this module's own names may be gone
    results: queue.Queue = queue.Queue(maxsize=ahead)
    stop = threading.Event()
    done = object()

    def offer(item) -> bool:
        while not stop.is_set():
            try:
                results.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for job in jobs:
                if not offer((job(), None)):
                    return
            offer((done, None))
        except BaseException as error:  # raised again in the thread that reads the results
            offer((done, error))

    thread = threading.Thread(target=work, daemon=True, name="packing")
    thread.start()
    try:
        while True:
            item, error = results.get()
            if error is not None:
                raise error
            if item is done:
                return
            yield item
    finally:
        stop.set()
        if not is_finalizing():  # when the interpreter exits, threads are stopped, and Python 3.13 would wait forever
            thread.join()
