"""What reaches a terminal shows itself and moves nothing."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_dpo_jax.printable import JOINERS, printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b]0;title\x07\x1b[2J", "\\x1b]0;title\\x07\\x1b[2J"),
        ("over\rwritten\x08\x7f", "over\\x0dwritten\\x08\\x7f"),
        ("\x9b31m", "\\x9b31m"),  # C1: an escape of one byte
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),  # written from right to left
        ("a\u200bb\ufeff\u2028", "a\\u200bb\\ufeff\\u2028"),
        ("\udcff.jsonl", "\\udcff.jsonl"),  # a file's name that is not UTF-8
        ("\U000e0041", "\\U000e0041"),  # letters that nobody sees
    ],
)
def test_what_a_terminal_would_obey_or_hide_is_spelled_out(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "two lines\n\tand a tab",
        "Grüße, 你好\u3000世界, شكرا, \u00a0",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467 ❤\ufe0f",
        "می\u200cخواهم",
    ],
)
def test_what_people_write_stays(text):
    assert printable(text) == text


@given(st.text(st.characters(codec=None)))
def test_anything_can_be_printed_and_is_the_same_the_second_time(text):
    shown = printable(text)
    shown.encode()  # a lone surrogate would raise
    assert printable(shown) == shown
    hidden = {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert hidden <= {"\n", "\t", *JOINERS}
