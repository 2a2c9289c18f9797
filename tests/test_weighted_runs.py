"""Weights and target margins go from the columns of rows to the loss of a run."""

import numpy as np
import pytest
from tiny_runs import plain_rows, read_metrics, run_config, training_metrics, write_rows

from lora_dpo_jax.main.train import main
from lora_dpo_jax.runs.assembly import load_tables
from lora_dpo_jax.runs.base import load_tokenizer

pytestmark = pytest.mark.usefixtures("two_devices")

WEIGHTS, MARGINS = [0.5, 2.0, 0.0, 1.0, 1.5, 0.25], [0.0, 1.0, 2.5, 0.125, 3.0, 0.5]
FORMAT = {"weight_field": "trust", "margin_field": "gap"}


@pytest.fixture
def rows(tmp_path):
    numbers = zip(plain_rows(6), WEIGHTS, MARGINS, strict=True)
    return write_rows(tmp_path / "rows.jsonl", [row | {"trust": w, "gap": m} for row, w, m in numbers])


def test_a_run_begins_at_the_loss_of_its_weights_and_margins(tmp_path, rows):
    """The check of step 0 asks for it; ld_alpha makes the evaluation read columns too."""
    config = run_config(
        tmp_path,
        rows,
        data__components__prefs__format=FORMAT,
        loss={"type": "sigmoid", "ld_alpha": 0.5},
        data__components__same={
            "source": {"type": "url", "validation_urls": [str(rows)]},
            "format": FORMAT,
        },
    )
    main(config)
    expected = np.array(WEIGHTS) * np.logaddexp(0, MARGINS)
    first = training_metrics(config)[0]
    assert first["train/loss"] == pytest.approx(expected[:4].mean(), abs=1e-5)
    assert first["train/dpo_accuracy"] == 0.5
    held_out = next(line for line in read_metrics(config) if "eval/loss" in line)
    assert held_out["eval/loss"] == pytest.approx(expected.mean(), abs=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss": {"type": "bco_pair"}}, r"loss\.type=bco_pair has no target margin .* data\.components\.prefs sets"),
        (
            {"data__components__other": {"source": {"type": "url", "train_urls": ["ROWS"]}}},
            r"data\.components\.other has no format\.margin_field, and other components have",
        ),
        (
            {"data__components__prefs__format": FORMAT | {"weight_field": "gone"}},
            r"rows\.jsonl, row 1: 'gone', format\.weight_field, is not there",
        ),
    ],
)
def test_margins_that_no_loss_reads_are_refused(tmp_path, rows, settings, message):
    if "data__components__other" in settings:
        settings["data__components__other"]["source"]["train_urls"] = [str(rows)]
    config = run_config(tmp_path, rows, **{"data__components__prefs__format": FORMAT, **settings})
    with pytest.raises(ValueError, match=message):
        load_tables(config, load_tokenizer(config))
