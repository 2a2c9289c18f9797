"""Log-probs of the reference, computed once and kept on disk. The key is a hash of everything that affects them.

    <cache_dir>/reference/<key>/
      records.bin    16 bytes for each known response: its number among the responses of its component, log p
                     (float32, nats), a number for the rows that it was computed in, a checksum
      meta.json      the contents of the key, for people; no code reads it

A key is for one reference model and one tokenized component, whatever part of the component a run uses, and for
whatever purpose. Several runs may append records at once; a response recorded twice is harmless. Checksums are salted
with the key, so damaged or foreign records are not used. Missing log-probs are computed.

The rows that a response was computed in decide the last bits of its log-prob: sums in attention depend on the place in
the row. So a record names its rows. Of several records of a response, the first one counts.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from lora_dpo_jax.data.table import ExampleSource, ExampleTable
from lora_dpo_jax.evaluation import Scorer
from lora_dpo_jax.files import replace_file
from lora_dpo_jax.models import CausalLM

logger = logging.getLogger(__name__)

VERSION = 3  # increase it when the same model and tokens would get other log-probs, or the files another layout
RECORD = np.dtype([("response", "<i4"), ("log_prob", "<f4"), ("rows", "<u4"), ("checksum", "<u4")])
OTHER_ROWS = 0  # the number of all rows that no step has
CHECKED_BYTES = RECORD.fields["checksum"][1]  # pyright: ignore[reportOptionalSubscript]


class ReferenceCache:
    """The known log-probs of one reference model. Only the first process uses the disk; all make the same calls."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        """`identity` holds everything that affects the log-probs, except the examples; it must serialize to JSON."""
        self.folder, self.identity = folder, {"version": VERSION, **identity}

    def find(self, examples: ExampleTable, *, rows: int | None = None) -> np.ndarray:
        """float32 [response of the table] in nats, NaN where it is not known; the same on every process.

        With `rows`, only log-probs that were computed in the rows of that number; see `record`.
        """
        values = np.full(len(examples.arrays.response_tokens), np.nan, np.float32)
        if jax.process_index() == 0:
            known = [
                self._records(source).read(rows)[source.arrays.responses_of(indices)]
                for source, indices in examples.components
            ]
            values = np.concatenate([values[:0], *known])
        return np.array(multihost_utils.broadcast_one_to_all(values))

    def compute(self, model: CausalLM, score: Scorer, known: np.ndarray | None = None) -> np.ndarray:
        """The log-probs of the examples of `score` under the reference `model`, in the form of `find`.

        `known` log-probs, which come from `find`, stay unchanged. Batches that hold no others are left out.
        """
        examples = score.examples
        values = np.full(len(examples.arrays.response_tokens), np.nan, np.float32) if known is None else known
        is_missing = missing_examples(examples, values)
        batches = score.in_batches(model) if is_missing.all() else score.in_batches(model, wanted=is_missing)
        return self.record(examples, ((OTHER_ROWS, ids, found) for ids, found in batches), values)

    def record(
        self, examples: ExampleTable, batches: Iterable[tuple[int, np.ndarray, np.ndarray]], known: np.ndarray
    ) -> np.ndarray:
        """`known`, completed by log-probs that `batches` compute: (the number of their rows, example ids, log-probs).

        Each batch is on disk before the next one is computed, so that an interruption loses little.
        """
        arrays, values, is_missing = examples.arrays, known.copy(), missing_examples(examples, known)
        is_first = jax.process_index() == 0
        # None shows the bar only on a terminal.
        disable = None if is_first else True
        unit = f" {arrays.noun}"
        with tqdm(total=int(is_missing.sum()), desc="reference log-probs", unit=unit, disable=disable) as progress:
            for rows, ids, found in batches:
                new = is_missing[ids]
                is_new = np.repeat(new, arrays.response_counts[ids])
                values[arrays.responses_of(ids[new])] = found[is_new]
                ids = np.sort(ids[new])
                is_missing[ids] = False
                if is_first:
                    self._add(examples.subset(ids), values[arrays.responses_of(ids)], rows)
                progress.update(len(ids))
        return values

    def _add(self, examples: ExampleTable, values: np.ndarray, rows: int) -> None:
        """Appends the log-probs of all responses of a table, float32 [response], computed in rows of that number."""
        start = 0
        for source, indices in examples.components:
            responses = source.arrays.responses_of(indices)
            if len(responses):
                self._records(source).append(responses, values[start : start + len(responses)], rows)
            start += len(responses)

    def _records(self, source: ExampleSource) -> "_Records":
        shaped_by = {**self.identity, "examples": source.fingerprint}
        return _Records(self.folder, shaped_by, len(source.arrays.response_tokens))


def missing_examples(examples: ExampleTable, values: np.ndarray) -> np.ndarray:
    """bool [example]: whether any response of the example is NaN in `values`, float32 [response]."""
    is_missing = np.zeros(len(examples), bool)
    is_missing[np.repeat(np.arange(len(examples)), examples.arrays.response_counts)[np.isnan(values)]] = True
    return is_missing


class _Records:
    """The file of one key."""

    def __init__(self, folder: Path, shaped_by: Mapping[str, Any], num_responses: int):
        self.description = json.dumps(shaped_by, indent=1, sort_keys=True)
        key = hashlib.sha256(self.description.encode()).hexdigest()
        self.folder, self.num_responses = folder / key, num_responses
        self.path, self.salt = self.folder / "records.bin", zlib.crc32(key.encode())

    def read(self, rows: int | None = None) -> np.ndarray:
        """float32 [response], NaN without a sound record (with `rows`: of these rows). Removes unsound records."""
        values = np.full(self.num_responses, np.nan, np.float32)
        if not self.path.exists():
            return values
        content = self.path.read_bytes()
        records = np.frombuffer(content, RECORD, count=len(content) // RECORD.itemsize)
        is_sound = self._are_sound(records)
        if not is_sound.all() or len(content) % RECORD.itemsize:
            self._keep_only(records, is_sound, len(content))
        sound = records[is_sound]
        if rows is not None:
            sound = sound[sound["rows"] == rows]
        first = sound[::-1]  # of several records of a response, the last one assigned is the first one written
        values[first["response"]] = first["log_prob"]
        return values

    def append(self, responses: np.ndarray, values: np.ndarray, rows: int) -> None:
        """Appends log-probs [response]. Those that are not finite are left out, so that they are computed again."""
        is_finite = np.isfinite(values)
        records = np.zeros(int(is_finite.sum()), RECORD)
        records["response"], records["log_prob"] = responses[is_finite], values[is_finite]
        records["rows"] = rows
        records["checksum"] = self._checksums(records)
        try:
            self._write(records.tobytes())
        except OSError as error:
            raise OSError(
                f"data.cache_dir: the reference's log-probs could not be written to {self.path} ({error}). What is "
                "there is kept. Make room, or set it to another folder"
            ) from error

    def _write(self, records: bytes) -> None:
        if not self.folder.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.folder / "meta.json", self.description.encode())
        # Opened anew each time, because another run may have replaced a damaged file. Whole records in one write, so
        # that records of several runs do not mix.
        with open(self.path, "ab", buffering=0) as file:
            # A run that was killed while writing may have left a part of a record.
            content = bytes(-file.tell() % RECORD.itemsize) + records
            if file.write(content) != len(content):
                raise OSError(f"only a part of {len(content)} bytes was written; is the disk full?")

    def _are_sound(self, records: np.ndarray) -> np.ndarray:
        in_range = (records["response"] >= 0) & (records["response"] < self.num_responses)
        return in_range & np.isfinite(records["log_prob"]) & (records["checksum"] == self._checksums(records))

    def _checksums(self, records: np.ndarray) -> np.ndarray:
        content, size = records.tobytes(), RECORD.itemsize
        starts = range(0, len(content), size)
        checksums = (zlib.crc32(content[start : start + CHECKED_BYTES], self.salt) for start in starts)
        return np.fromiter(checksums, np.uint32, count=len(records))

    def _keep_only(self, records: np.ndarray, is_sound: np.ndarray, size: int) -> None:
        """Removes unsound records. Records that another run appends meanwhile are lost, and computed again later."""
        unsound = np.flatnonzero(~is_sound)
        first = int(unsound[0] if len(unsound) else len(records)) * RECORD.itemsize
        logger.warning(
            "%s: %d of %d records are damaged or belong to another cache, and %d bytes at the end are no whole record "
            "(the first fault is at byte %d). They are removed, and their log-probs are computed again.",
            self.path,
            len(unsound),
            len(records),
            size % RECORD.itemsize,
            first,
        )
        replace_file(self.path, records[is_sound].tobytes())
