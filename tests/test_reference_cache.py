"""What the cache of the reference's log-probs gives is what was computed, whatever happened to its files."""

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny_disks import no_file_larger_than
from tiny_pairs import new_adapters, random_pairs

from lora_dpo_jax.data.table import ExampleTable
from lora_dpo_jax.evaluation import Scorer
from lora_dpo_jax.lora import unwrap_lora
from lora_dpo_jax.reference_cache import RECORD, ReferenceCache, missing_examples

SIZE = RECORD.itemsize


ONE, TWO = random_pairs(13, seed=1), random_pairs(9, seed=2)


def table(one, two=()) -> ExampleTable:
    """Of the pairs with these indices."""
    return ExampleTable({"one": (ONE, np.array(one, int)), "two": (TWO, np.array(two, int))})


ALL = table(range(13), range(9))


@pytest.fixture(scope="module")
def reference():
    return unwrap_lora(new_adapters())


@pytest.fixture(scope="module")
def truth(reference) -> np.ndarray:
    """float32 [response of ALL]"""
    scores = Scorer(ALL, rows=2)(reference)
    return np.asarray(scores.log_probs.array)


@pytest.fixture
def cache(tmp_path) -> ReferenceCache:
    return ReferenceCache(tmp_path, {"weights": "abc"})


def fill(cache: ReferenceCache, reference, pairs: ExampleTable = ALL) -> list[int]:
    """Computes what is not known; gives the numbers of those pairs."""
    missing = np.flatnonzero(missing_examples(pairs, cache.find(pairs)))
    if len(missing):
        cache.compute(reference, Scorer(pairs.subset(missing), rows=1))
    return missing.tolist()


def responses_of(ids) -> np.ndarray:
    return ALL.arrays.responses_of(np.asarray(ids))


def assert_right(found: np.ndarray, truth: np.ndarray) -> None:
    assert found.dtype == np.float32
    # Rows are packed in another way: the order of sums over some 50 nats.
    np.testing.assert_allclose(found, truth, rtol=1e-5)


def record_files(cache: ReferenceCache) -> dict[int, Path]:
    """By the number of their records."""
    return {path.stat().st_size // SIZE: path for path in cache.folder.glob("*/records.bin")}


def test_what_was_computed_is_found_by_every_table_of_the_same_components(cache, reference, truth):
    assert np.isnan(cache.find(ALL)).all()
    assert fill(cache, reference) == list(range(22))
    assert_right(cache.find(ALL), truth)
    some = table([2, 3, 11], [0, 8])
    np.testing.assert_array_equal(cache.find(some), cache.find(ALL)[responses_of([2, 3, 11, 13, 21])])
    assert fill(cache, reference, some) == []


def test_computing_gives_what_is_found_later(cache, reference):
    some = table([4, 7], [1])
    np.testing.assert_array_equal(cache.compute(reference, Scorer(some, rows=1)), cache.find(some))
    known = ~missing_examples(ALL, cache.find(ALL))
    assert np.flatnonzero(known).tolist() == [4, 7, 14]


def test_another_identity_or_other_pairs_find_nothing(cache, reference, tmp_path):
    fill(cache, reference)
    assert np.isnan(ReferenceCache(tmp_path, {"weights": "abd"}).find(ALL)).all()
    other = ExampleTable({"one": (random_pairs(13, seed=3), np.arange(13))})
    assert np.isnan(cache.find(other)).all()
    assert not np.isnan(ReferenceCache(tmp_path, {"weights": "abc"}).find(ALL)).any()


def test_a_folder_says_what_it_is_of(cache, reference):
    fill(cache, reference)
    (meta,) = (path.with_name("meta.json") for count, path in record_files(cache).items() if count == 18)
    assert f'"examples": "{TWO.fingerprint}"' in meta.read_text() and '"weights": "abc"' in meta.read_text()


class Interrupted(Exception):
    pass


class InterruptedScorer(Scorer):
    after = 3  # batches

    def in_batches(self, model, *args, **kwargs):
        for number, batch in enumerate(super().in_batches(model, *args, **kwargs)):
            if number == self.after:
                raise Interrupted
            yield batch


def test_interrupted_filling_resumes_with_the_rest(cache, reference, truth):
    with pytest.raises(Interrupted):
        cache.compute(reference, InterruptedScorer(ALL, rows=1))
    left = np.flatnonzero(missing_examples(ALL, cache.find(ALL))).tolist()
    assert 0 < len(left) < 22
    assert fill(cache, reference) == left
    assert_right(cache.find(ALL), truth)
    assert sum(record_files(cache)) == 44, "nothing was computed twice"


def test_rows_of_a_number_are_found_by_it(cache):
    ids = np.arange(22)
    others, mine = (np.full(44, value, np.float32) for value in (-1.0, -2.0))
    nothing = np.full(44, np.nan, np.float32)
    cache.record(ALL, [(5, ids[:12], others[:24])], nothing)
    cache.record(ALL, [(7, ids, mine)], nothing)
    assert np.isnan(cache.find(ALL, rows=6)).all()
    np.testing.assert_array_equal(cache.find(ALL, rows=7), mine)
    # Of several, the first one counts: a later run of other rows changes no value of an earlier run.
    np.testing.assert_array_equal(cache.find(ALL), [-1.0] * 24 + [-2.0] * 20)
    np.testing.assert_array_equal(cache.find(table([], range(9)), rows=7), mine[26:])


def test_a_batch_is_recorded_before_the_next_one_is_computed(cache):
    def batches():
        yield 1, np.array([3, 2]), np.float32([-1, -2, -3, -4])
        np.testing.assert_array_equal(cache.find(table([2, 3])), [-3, -4, -1, -2])
        yield 2, np.array([2, 4]), np.float32([-9, -9, -5, -6])

    found = cache.record(ALL, batches(), np.full(44, np.nan, np.float32))
    np.testing.assert_array_equal(found[4:10], [-3, -4, -1, -2, -5, -6])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5 * SIZE + 6] ^= 1  # of a log-prob
    path.write_bytes(content)


def cut_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def put_garbage_before(path: Path) -> None:
    path.write_bytes(b"garbage!" + path.read_bytes())


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    "damage, lost, says",
    [
        (flip_a_byte, 1, "1 of 26 records are damaged or belong to another cache, and 0 bytes.*at byte 80"),
        (cut_the_end, 1, "0 of 25 records are .* and 11 bytes at the end are no whole record.*at byte 400"),
        (put_garbage_before, 13, "26 of 26 records .* and 8 bytes at the end .*at byte 0"),
        (fill_with_zeros, 13, "26 of 26 records .* and 0 bytes"),
    ],
)
def test_a_damaged_file_is_told_repaired_and_computed_again(cache, reference, truth, caplog, damage, lost, says):
    fill(cache, reference)
    damage(record_files(cache)[26])
    known = cache.find(ALL)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert str(cache.folder) in warning.getMessage()
    caplog.clear()
    missing = missing_examples(ALL, known)
    assert missing.sum() == lost and not missing[13:].any()
    assert_right(known[~np.isnan(known)], truth[~np.isnan(known)])
    assert fill(cache, reference) == np.flatnonzero(missing).tolist()
    assert_right(cache.find(ALL), truth)
    assert not caplog.records
    assert sorted(record_files(cache)) in ([18, 26], [18, 27])
    assert re.search(says, warning.getMessage())


@pytest.mark.parametrize("source", ["another model", "another component"])
def test_the_file_of_another_cache_is_not_believed(cache, reference, truth, tmp_path, caplog, source):
    other = ReferenceCache(tmp_path / "other", {"weights": "abd"})
    for each in (cache, other):
        fill(each, reference)
    foreign = record_files(other)[26] if source == "another model" else record_files(cache)[18]
    record_files(cache)[26].write_bytes(foreign.read_bytes())
    assert np.isnan(cache.find(ALL)[:26]).all()
    assert "belong to another cache" in caplog.text
    fill(cache, reference)
    assert_right(cache.find(ALL), truth)


def test_records_added_after_a_torn_one_are_found(cache, reference, truth):
    """A run that is killed while writing leaves a part of a record; another run, which has read the file, goes on."""
    fill(cache, reference, table(range(6)))
    (path,) = record_files(cache).values()
    with path.open("ab") as file:
        file.write(b"torn off")
    cache.compute(reference, Scorer(table(range(6, 13)), rows=1))
    assert_right(cache.find(ALL)[:26], truth[:26])


def test_a_full_disk_is_told_and_what_was_written_is_kept(cache, reference, truth):
    with (
        no_file_larger_than(5 * SIZE + 3),
        pytest.raises(
            OSError, match="^data.cache_dir: the reference's log-probs could not be written to .*records.bin"
        ),
    ):
        cache.compute(reference, Scorer(table(range(13)), rows=1))
    known = ~np.isnan(cache.find(ALL))
    assert known.sum() <= 5
    assert_right(cache.find(ALL)[known], truth[known])
    fill(cache, reference)
    assert_right(cache.find(ALL), truth)


def test_what_is_not_finite_is_not_kept(cache, reference):
    class Broken:
        examples = table([1, 2, 3])

        def in_batches(self, model):
            for ids, found in Scorer(self.examples, rows=8).in_batches(model):
                pairs = found.reshape(-1, 2)
                pairs[ids == 1, 0] = np.nan
                pairs[ids == 2, 1] = -np.inf
                yield ids, found

    computed = cache.compute(reference, Broken())  # pyright: ignore[reportArgumentType]
    assert np.isnan(computed[2]) and computed[5] == -np.inf
    found = cache.find(Broken.examples)
    np.testing.assert_array_equal(found[[0, 1, 3, 4]], computed[[0, 1, 3, 4]])
    assert np.isnan(found[[2, 5]]).all()


def test_several_runs_fill_at_once(cache, reference, truth, caplog):
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: cache.compute(reference, Scorer(ALL, rows=1)), range(4)))
    assert sorted(record_files(cache)) == [4 * 18, 4 * 26]
    assert_right(cache.find(ALL), truth)
    assert not caplog.records
