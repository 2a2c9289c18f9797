"""The batch whose step is compiled to foretell what a run takes."""

from tiny_runs import run_config

from lora_dpo_jax.runs.capacity import expected_batch

PAIR_TOKENS = [60, 100, 90]


def test_rows_hold_the_step_and_no_more(tmp_path):
    config = run_config(tmp_path, tmp_path, train_seq_len=256, trainer__train_batch_size=16)
    batch = expected_batch(config, PAIR_TOKENS, 4, -1)
    assert [axis.size for axis in batch.tokens.axes] == [1, 4, 1152]  # 16 pairs of 250 tokens, over four
    assert int(batch.examples.is_example.array.sum()) == 16
    one = expected_batch(config, PAIR_TOKENS, 4, 1)
    assert [axis.size for axis in one.tokens.axes] == [2, 4, 512]  # the longest pair that train_seq_len allows
