"""Dropout follows a token, not its place."""

import haliax as hax
import jax
import numpy as np
from tiny_pairs import named

from lora_dpo_jax.lora import TokenKey


def test_a_token_drops_the_same_wherever_it_is_and_no_two_drop_alike():
    Row, Pos, Embed, Head = hax.make_axes(row=2, position=3, embed=32, head=2)
    numbers = np.array([[7, 1, 2], [3, 7, 4]], np.int32)
    key = TokenKey(jax.random.key(0), (named(numbers, "row", "position"), named(numbers * 0, "row", "position")))
    kept = key.bernoulli((Row, Head, Pos, Embed), 0.5)
    assert kept.axes == (Row, Head, Pos, Embed) and 0.4 < kept.array.mean() < 0.6
    by_token = np.asarray(kept.rearrange((Row, Pos, Head, Embed)).array).reshape(6, -1)
    np.testing.assert_array_equal(by_token[0], by_token[4])
    assert len(np.unique(by_token, axis=0)) == 5
    other, another = (k.bernoulli((Row, Head, Pos, Embed), 0.5).array for k in key.split(2))
    assert not np.array_equal(other, kept.array) and not np.array_equal(other, another)
