"""`--without-torch` leaves out what needs torch, and nothing else."""

from pathlib import Path

import pytest
from torch_users import FIXTURES, needs_torch

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    "file, needs",
    [
        ("test_main.py", True),
        ("huggingface/test_digests.py", True),  # by tiny_models.py alone
        ("data/conftest.py", True),  # within a fixture
        ("training/test_choice.py", True),  # by a module of transformers that imports torch
        ("test_resume.py", False),
        ("tiny_runs.py", False),  # whole runs
        ("tiny_pairs.py", False),
    ],
)
def test_a_file_needs_torch_if_it_or_what_it_shares_imports_it(file, needs):
    assert needs_torch(TESTS / file) == needs


def test_the_fixtures_that_need_torch_are_those_of_the_one_conftest_that_does():
    assert [str(path.relative_to(TESTS)) for path in TESTS.rglob("conftest.py") if needs_torch(path)] == [
        "data/conftest.py"
    ]
    assert all(f"def {name}(" in (TESTS / "data" / "conftest.py").read_text() for name in FIXTURES)
