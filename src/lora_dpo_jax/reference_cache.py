"""Log-probs of the reference, computed once and kept on disk. The key is a hash of everything that affects them.

    <cache_dir>/reference/<key>/
      records.bin    12 bytes for each known response: its number among the responses of its component, log p
                     (float32, nats), a checksum
      meta.json      the contents of the key, for people; no code reads it
    <cache_dir>/reference/<key of a table>.started
                     the examples that a run is computing, in case it is interrupted; removed when all are done

A key is for one reference model and one tokenized component, whatever part of the component a run uses, and for
whatever purpose. Several runs may append records at once; a response recorded twice is harmless. Checksums are salted
with the key, so damaged or foreign records are not used. Missing log-probs are computed.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Mapping
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

VERSION = 2  # increase it when the same model and tokens would get other log-probs, or the files another layout
RECORD = np.dtype([("response", "<i4"), ("log_prob", "<f4"), ("checksum", "<u4")])
CHECKED_BYTES = RECORD.fields["checksum"][1]  # pyright: ignore[reportOptionalSubscript]


class ReferenceCache:
    """The known log-probs of one reference model. Only the first process uses the disk; all make the same calls."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        """`identity` holds everything that affects the log-probs, except the examples; it must serialize to JSON."""
        self.folder, self.identity = folder, {"version": VERSION, **identity}

    def find(self, examples: ExampleTable) -> np.ndarray:
        """float32 [response of the table] in nats, NaN where it is not known; the same on every process."""
        values = np.full(len(examples.arrays.response_tokens), np.nan, np.float32)
        if jax.process_index() == 0:
            known = [
                self._records(source).read()[source.arrays.responses_of(indices)]
                for source, indices in examples.components
            ]
            values = np.concatenate([values[:0], *known])
        return np.array(multihost_utils.broadcast_one_to_all(values))

    def compute(self, model: CausalLM, score: Scorer, known: np.ndarray | None = None) -> np.ndarray:
        """The log-probs of the examples of `score` under the reference `model`, in the form of `find`.

        `known` log-probs, which come from `find`, stay unchanged. Each batch is on disk before the next one is
        computed, so that an interruption loses little.
        """
        examples, arrays = score.examples, score.examples.arrays
        values = np.full(len(arrays.response_tokens), np.nan, np.float32) if known is None else known.copy()
        is_missing = missing_examples(examples, values)
        is_first = jax.process_index() == 0
        batches = score.in_batches(model) if is_missing.all() else score.in_batches(model, wanted=is_missing)
        # None shows the bar only on a terminal.
        disable = None if is_first else True
        unit = f" {arrays.noun}"
        with tqdm(total=int(is_missing.sum()), desc="reference log-probs", unit=unit, disable=disable) as progress:
            for ids, found in batches:
                new = is_missing[ids]
                is_new = np.repeat(new, arrays.response_counts[ids])
                values[arrays.responses_of(ids[new])] = found[is_new]
                ids = np.sort(ids[new])
                if is_first:
                    self._add(examples.subset(ids), values[arrays.responses_of(ids)])
                progress.update(len(ids))
        return values

    def to_compute(self, examples: ExampleTable, missing: np.ndarray) -> np.ndarray:
        """The examples to give to `compute` together: `missing`, and all others that an interrupted run began with.

        Log-probs get the same bits when the same examples are packed together. So a resumed run ends as if it had
        never been interrupted.
        """
        is_wanted = np.zeros(len(examples), bool)
        if jax.process_index() == 0:
            path = self._started_path(examples)
            started = _read_started(path, len(examples))
            if not np.isin(missing, started).all():
                started = missing
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, json.dumps(started.tolist()).encode())
            is_wanted[started] = True
        return np.flatnonzero(multihost_utils.broadcast_one_to_all(is_wanted))

    def all_computed(self, examples: ExampleTable) -> None:
        """To be called when all examples from `to_compute` are computed."""
        if jax.process_index() == 0:
            self._started_path(examples).unlink(missing_ok=True)

    def _started_path(self, examples: ExampleTable) -> Path:
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode())
        for source, indices in examples.components:
            key.update(source.fingerprint.encode() + np.asarray(indices, np.int64).tobytes())
        return self.folder / f"{key.hexdigest()}.started"

    def _add(self, examples: ExampleTable, values: np.ndarray) -> None:
        """Appends the log-probs of all responses of a table, float32 [response]."""
        start = 0
        for source, indices in examples.components:
            responses = source.arrays.responses_of(indices)
            if len(responses):
                self._records(source).append(responses, values[start : start + len(responses)])
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

    def read(self) -> np.ndarray:
        """float32 [response], NaN without a sound record. Unsound records are removed from the file."""
        values = np.full(self.num_responses, np.nan, np.float32)
        if not self.path.exists():
            return values
        content = self.path.read_bytes()
        records = np.frombuffer(content, RECORD, count=len(content) // RECORD.itemsize)
        is_sound = self._are_sound(records)
        if not is_sound.all() or len(content) % RECORD.itemsize:
            self._keep_only(records, is_sound, len(content))
        sound = records[is_sound]
        values[sound["response"]] = sound["log_prob"]
        return values

    def append(self, responses: np.ndarray, values: np.ndarray) -> None:
        """Appends log-probs [response]. Those that are not finite are left out, so that they are computed again."""
        is_finite = np.isfinite(values)
        records = np.zeros(int(is_finite.sum()), RECORD)
        records["response"], records["log_prob"] = responses[is_finite], values[is_finite]
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


def _read_started(path: Path, num_examples: int) -> np.ndarray:
    """The listed examples; none if the list cannot be read. A wrong list only changes the last bits of log-probs."""
    try:
        started = np.array(json.loads(path.read_bytes()), np.int64)
    except (OSError, ValueError, TypeError):
        return np.zeros(0, np.int64)
    return started[(started >= 0) & (started < num_examples)]
