"""Two spellings of one place are one place, and two places are two."""

import os
from pathlib import Path

import pytest

from lora_dpo_jax.places import is_within, parent_of, place_of, same_place, spelled_alike


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working folder, with a folder `out` and `link`, which leads to it."""
    (tmp_path / "out" / "deeper").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "to nothing").symlink_to("later/x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


SPELLINGS = ["out", "out/", "./out", "out//", "out/../out", "out/deeper/..", "link", "link/", "link/../out", "~/out"]
SPELLINGS += ["file://HERE/out", "local://HERE/./out/"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings_of_a_path_are_one_place(here, spelling):
    spelling = spelling.replace("HERE", str(here))
    assert place_of(spelling) == str(here / "out")
    assert same_place(spelling, here / "out") and is_within(f"{spelling}/deeper", "out")


def test_a_link_to_nothing_yet_is_what_it_leads_to(here):
    assert place_of("to nothing") == str(here / "later" / "x")
    assert parent_of("to nothing") == str(here / "later")


def test_a_file_of_two_names_is_one(here):
    os.link("file", "second name")
    assert same_place("file", "second name")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("gs://bucket/out", "gs://bucket/out/"),
        ("gs://bucket/out", "gcs://bucket/./out"),
        ("s3://bucket/a/../out", "s3a://bucket/out"),
        ("memory://out", "memory:///out"),
        ("unknown://x/out/", "unknown://x/out"),
    ],
)
def test_all_spellings_of_a_url_are_one_place(one, other):
    assert same_place(one, other) and is_within(f"{one}/step-2", other)
    assert place_of(place_of(one)) == place_of(one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("out", "out2"),
        ("out", "out/deeper"),
        ("gs://a/out", "s3://a/out"),
        ("gs://a/out", "gs://a/out2"),
        ("out", "gs://out"),
    ],
)
def test_two_places_are_two(here, one, other):
    assert not same_place(one, other) and not is_within(one, other)


def test_what_holds_a_place():
    assert parent_of("/a/b") == "/a"
    assert parent_of("gs://bucket/x.jsonl") == "gs://bucket"
    assert place_of(parent_of("memory://x.jsonl")) == "memory://"
    assert parent_of("https://host/a/b") == "https://host/a"


@pytest.mark.parametrize(
    "missing, found",
    [
        ("fil", "file"),
        ("out/deepr", "out/deeper"),
        ("~/flie", "HERE/file"),
        ("ouut/deeper", "out/deeper"),
        ("linc/deeper/more", "link"),
    ],
)
def test_a_name_that_is_not_there_has_a_neighbour_that_is_spelled_alike(here, missing, found):
    assert spelled_alike(missing) == f"; did you mean {found.replace('HERE', str(here))}?"


@pytest.mark.parametrize(
    "path", ["file", "out/other", "", ".", "~nobody-here/x", "a\0b", "x" * 5000, "gs://bucket/fil"]
)
def test_nothing_is_offered_where_nothing_is_alike(here, path):
    assert spelled_alike(path) == ""
