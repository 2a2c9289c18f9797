"""Log-probs of the reference, computed once and kept on disk under a key made of all that shapes them.

    <cache_dir>/reference/<key>/
      records.bin    16 bytes for each pair that is known: its index in its component, log p of the chosen and of the
                     rejected response (float32, nats), a checksum
      meta.json      what the key was made of; for people, nothing reads it

A key stands for one reference model and one tokenized component, whatever part of it a run uses and whatever it does
with it. Runs append records, several at once if they like; a pair recorded twice is harmless. Checksums are salted with
the key, so that nothing in a damaged file, or in one that came from elsewhere, is taken for a record. What is not found
is computed.
"""

import hashlib
import json
import logging
import os
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from lora_dpo_jax.data.cache import TokenizedPairs
from lora_dpo_jax.data.loader import PairTable
from lora_dpo_jax.evaluation import PairScorer
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

    def compute(self, model: CausalLM, score: PairScorer) -> np.ndarray:
        """The log-probs of the pairs of `score` under the reference `model`, as `find` gives them.

        Each batch is on disk before the next one is computed, so that little is lost when this is interrupted.
        """
        pairs = score.pairs
        values = np.full((len(pairs), 2), np.nan, np.float32)
        is_first = jax.process_index() == 0
        # None shows the bar on a terminal alone.
        disable = None if is_first else True
        with tqdm(total=len(pairs), desc="reference log-probs", unit=" pairs", disable=disable) as progress:
            for ids, found in score.in_batches(model):
                values[ids] = np.stack([found["chosen"], found["rejected"]], axis=-1)
                ids = np.sort(ids)
                if is_first:
                    self._add(pairs.subset(ids), values[ids])
                progress.update(len(ids))
        return values

    def _add(self, pairs: PairTable, values: np.ndarray) -> None:
        parts = np.split(values, np.cumsum(pairs.sizes)[:-1])
        for (component, indices), part in zip(pairs.components, parts, strict=True):
            if len(indices):
                self._records(component).append(indices, part)

    def _records(self, component: TokenizedPairs) -> "_Records":
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
        if not self.folder.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._replace(self.folder / "meta.json", self.description.encode())
        # Opened anew each time, as another run may have put a file without damage in its place; whole records in one
        # write, so that those of several runs do not mix.
        with open(self.path, "ab", buffering=0) as file:
            # A run that was killed while writing may have left a part of a record.
            content = bytes(-file.tell() % RECORD.itemsize) + records.tobytes()
            if file.write(content) != len(content):
                raise OSError(f"{self.path}: only a part of {len(content)} bytes could be written; is the disk full?")

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
        self._replace(self.path, records[is_sound].tobytes())

    def _replace(self, path: Path, content: bytes) -> None:
        temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        temporary.write_bytes(content)
        os.replace(temporary, path)
