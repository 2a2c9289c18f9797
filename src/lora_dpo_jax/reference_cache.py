"""Log-probs of the reference, computed once and kept on disk under a key made of all that shapes them.

    <cache_dir>/reference/<key>/
      records.bin    16 bytes for each pair that is known: its index in its component, log p of the chosen and of the
                     rejected response (float32, nats), a checksum
      meta.json      what the key was made of; for people, nothing reads it
    <cache_dir>/reference/<key of a table of pairs>.plan
                     which of its pairs a run is computing, for when it is interrupted; gone when it is done

A key stands for one reference model and one tokenized component, whatever part of it a run uses and whatever it does
with it. Runs append records, several at once if they like; a pair recorded twice is harmless. Checksums are salted with
the key, so that nothing in a damaged file, or in one that came from elsewhere, is taken for a record. What is not found
is computed.
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

from lora_dpo_jax.data.batches import PairSource, PairTable
from lora_dpo_jax.evaluation import PairScorer
from lora_dpo_jax.files import replace_file
from lora_dpo_jax.models import CausalLM

logger = logging.getLogger(__name__)

VERSION = 1  # raise it when the same model and tokens would get other log-probs, or the files another layout
RECORD = np.dtype([("pair", "<i4"), ("chosen", "<f4"), ("rejected", "<f4"), ("checksum", "<u4")])
CHECKED_BYTES = RECORD.fields["checksum"][1]  # pyright: ignore[reportOptionalSubscript]


class ReferenceCache:
    """What is known of one reference model's log-probs. Only the first process touches the disk; all must call."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        """`identity` holds all that shapes the log-probs, but for the pairs; it must serialize to JSON."""
        self.folder, self.identity = folder, {"version": VERSION, **identity}

    def find(self, pairs: PairTable) -> np.ndarray:
        """float32 [pair, chosen / rejected] in nats, NaN where it is not known; the same on every process."""
        values = np.full((len(pairs), 2), np.nan, np.float32)
        if jax.process_index() == 0:
            known = [self._records(component).read()[indices] for component, indices in pairs.components]
            values = np.concatenate([values[:0], *known])
        return np.array(multihost_utils.broadcast_one_to_all(values))

    def compute(self, model: CausalLM, score: PairScorer, known: np.ndarray | None = None) -> np.ndarray:
        """The log-probs of the pairs of `score` under the reference `model`, as `find` gives them.

        Of what is `known`, as `find` gave it, nothing is changed. Each batch is on disk before the next one is
        computed, so that little is lost when this is interrupted.
        """
        pairs = score.pairs
        values = np.full((len(pairs), 2), np.nan, np.float32) if known is None else known.copy()
        is_missing = np.asarray(np.isnan(values).any(axis=1))
        is_first = jax.process_index() == 0
        batches = score.in_batches(model) if is_missing.all() else score.in_batches(model, wanted=is_missing)
        # None shows the bar on a terminal alone.
        disable = None if is_first else True
        with tqdm(total=int(is_missing.sum()), desc="reference log-probs", unit=" pairs", disable=disable) as progress:
            for ids, found in batches:
                computed, new = np.stack([found["chosen"], found["rejected"]], axis=-1), is_missing[ids]
                values[ids[new]] = computed[new]
                ids = np.sort(ids[new])
                if is_first:
                    self._add(pairs.subset(ids), values[ids])
                progress.update(len(ids))
        return values

    def plan(self, pairs: PairTable, missing: np.ndarray) -> np.ndarray:
        """The pairs to give to `compute` together: `missing`, and what else an interrupted run set out to compute.

        Pairs get the same bits when the same pairs are packed together. So a run that goes on ends as if it had never
        been interrupted.
        """
        is_planned = np.zeros(len(pairs), bool)
        if jax.process_index() == 0:
            path = self._plan_path(pairs)
            planned = _read_plan(path, len(pairs))
            if not np.isin(missing, planned).all():
                planned = missing
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, json.dumps(planned.tolist()).encode())
            is_planned[planned] = True
        return np.flatnonzero(multihost_utils.broadcast_one_to_all(is_planned))

    def end_plan(self, pairs: PairTable) -> None:
        """Nothing that `plan` gave is missing any more."""
        if jax.process_index() == 0:
            self._plan_path(pairs).unlink(missing_ok=True)

    def _plan_path(self, pairs: PairTable) -> Path:
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode())
        for component, indices in pairs.components:
            key.update(component.fingerprint.encode() + np.asarray(indices, np.int64).tobytes())
        return self.folder / f"{key.hexdigest()}.plan"

    def _add(self, pairs: PairTable, values: np.ndarray) -> None:
        parts = np.split(values, np.cumsum(pairs.sizes)[:-1])
        for (component, indices), part in zip(pairs.components, parts, strict=True):
            if len(indices):
                self._records(component).append(indices, part)

    def _records(self, component: PairSource) -> "_Records":
        return _Records(self.folder, {**self.identity, "pairs": component.fingerprint}, len(component))


class _Records:
    """The file of one key."""

    def __init__(self, folder: Path, shaped_by: Mapping[str, Any], num_pairs: int):
        self.description = json.dumps(shaped_by, indent=1, sort_keys=True)
        key = hashlib.sha256(self.description.encode()).hexdigest()
        self.folder, self.num_pairs = folder / key, num_pairs
        self.path, self.salt = self.folder / "records.bin", zlib.crc32(key.encode())

    def read(self) -> np.ndarray:
        """float32 [pair, chosen / rejected], NaN where there is no sound record. Unsound ones are removed."""
        values = np.full((self.num_pairs, 2), np.nan, np.float32)
        if not self.path.exists():
            return values
        content = self.path.read_bytes()
        records = np.frombuffer(content, RECORD, count=len(content) // RECORD.itemsize)
        is_sound = self._are_sound(records)
        if not is_sound.all() or len(content) % RECORD.itemsize:
            self._keep_only(records, is_sound, len(content))
        sound = records[is_sound]
        values[sound["pair"]] = np.stack([sound["chosen"], sound["rejected"]], axis=-1)
        return values

    def append(self, indices: np.ndarray, values: np.ndarray) -> None:
        """Adds log-probs [pair, chosen / rejected]; those that are not finite are left out, to be computed again."""
        is_finite = np.isfinite(values).all(axis=-1)
        records = np.zeros(int(is_finite.sum()), RECORD)
        records["pair"] = indices[is_finite]
        records["chosen"], records["rejected"] = values[is_finite].T
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
        # Opened anew each time, as another run may have put a file without damage in its place; whole records in one
        # write, so that those of several runs do not mix.
        with open(self.path, "ab", buffering=0) as file:
            # A run that was killed while writing may have left a part of a record.
            content = bytes(-file.tell() % RECORD.itemsize) + records
            if file.write(content) != len(content):
                raise OSError(f"only a part of {len(content)} bytes was; is the disk full?")

    def _are_sound(self, records: np.ndarray) -> np.ndarray:
        in_range = (records["pair"] >= 0) & (records["pair"] < self.num_pairs)
        is_finite = np.isfinite(records["chosen"]) & np.isfinite(records["rejected"])
        return in_range & is_finite & (records["checksum"] == self._checksums(records))

    def _checksums(self, records: np.ndarray) -> np.ndarray:
        content, size = records.tobytes(), RECORD.itemsize
        starts = range(0, len(content), size)
        checksums = (zlib.crc32(content[start : start + CHECKED_BYTES], self.salt) for start in starts)
        return np.fromiter(checksums, np.uint32, count=len(records))

    def _keep_only(self, records: np.ndarray, is_sound: np.ndarray, size: int) -> None:
        """Records that another run appends meanwhile are lost, which only means that they are computed again."""
        unsound = np.flatnonzero(~is_sound)
        first = int(unsound[0] if len(unsound) else len(records)) * RECORD.itemsize
        logger.warning(
            "%s: %d of %d records are damaged or belong to another cache, and %d bytes at the end are no whole record "
            "(the first fault is at byte %d). They are removed; what they stood for is computed again.",
            self.path,
            len(unsound),
            len(records),
            size % RECORD.itemsize,
            first,
        )
        replace_file(self.path, records[is_sound].tobytes())


def _read_plan(path: Path, num_pairs: int) -> np.ndarray:
    """None of the pairs if there is no plan that can be read. A wrong one only means other last bits."""
    try:
        planned = np.array(json.loads(path.read_bytes()), np.int64)
    except (OSError, ValueError, TypeError):
        return np.zeros(0, np.int64)
    return planned[(planned >= 0) & (planned < num_pairs)]
