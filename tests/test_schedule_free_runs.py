"""A run evaluates, samples, syncs with and exports averaged adapters, and resumes with those of its steps."""

from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from optax.contrib import schedule_free_eval_params
from safetensors.numpy import load_file
from tiny_pairs import adapters_of
from tiny_runs import preference_rows, run_config, training_metrics, write_rows

from lora_dpo_jax.evaluation import Scorer
from lora_dpo_jax.lora import trainable_filter
from lora_dpo_jax.main.train import main
from lora_dpo_jax.training.step import TrainState

pytestmark = pytest.mark.usefixtures("two_devices")

STEPS = 4


def config_of(folder: Path, rows: Path, steps: int, **settings):
    return run_config(
        folder,
        rows,
        optimizer={"type": "schedule_free", "learning_rate": 1e-2},
        lora={"r": 2, "target_modules": ["q_proj"]},
        reference_sync={"sync_steps": STEPS, "mixup_alpha": 1.0},
        validation_split_fraction=0.25,
        trainer__num_train_steps=steps,
        peft_save_path=str(folder / f"adapter-{steps}"),
        **settings,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[TrainState, list[dict[str, np.ndarray]], Path, Path]:
    """(the last state, the adapters of each evaluation, the folder, the rows) of a run of four steps."""
    folder = tmp_path_factory.mktemp("schedule_free")
    rows = write_rows(folder / "train.jsonl", preference_rows(16))
    scored, score = [], Scorer.__call__

    def remembered(self, model):
        scored.append(adapters_of(model))
        return score(self, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "__call__", remembered)
        state = main(config_of(folder, rows, STEPS))
    assert state is not None
    return state, scored, folder, rows


def averages(state: TrainState) -> dict[str, np.ndarray]:
    """optax's own, of the adapters of the steps."""
    found = next(node for node in jax.tree.leaves(state.opt_state, is_leaf=_has_z) if _has_z(node))
    return adapters_of(schedule_free_eval_params(found, eqx.filter(state.model, trainable_filter(state.model))))


def _has_z(node) -> bool:
    return hasattr(node, "z")


def test_the_averages_are_evaluated_and_exported(run):
    state, scored, folder, _ = run
    expected, stepped = averages(state), adapters_of(state.model)
    assert any(np.abs(expected[name] - stepped[name]).max() > 1e-4 for name in expected)
    evaluated = next(adapters for adapters in reversed(scored) if adapters.keys() == expected.keys())
    exported = load_file(folder / f"adapter-{STEPS}" / "adapter_model.safetensors")
    assert len(exported) == 2 * 2  # A and B of two layers
    tensors = {name.split(".self_attn.")[0][-1] + name.split("lora_")[1][0]: x for name, x in exported.items()}
    for name, average in expected.items():
        # The two forms of the average differ by rounding.
        np.testing.assert_allclose(evaluated[name], average, atol=1e-6)
        factor = "A" if "lora_A" in name else "B"
        for layer, matrix in enumerate(average):
            found = tensors[f"{layer}{factor}"]
            np.testing.assert_allclose(found, matrix.reshape(found.shape), atol=1e-6)


def test_the_reference_syncs_with_the_averages(run):
    """The last step replaced the reference."""
    state, *_ = run
    expected = averages(state)
    for name, adapter in adapters_of(state.reference).items():
        np.testing.assert_allclose(adapter, expected[name], atol=1e-6)


def test_a_run_that_stopped_resumes_with_the_adapters_of_its_steps(run, tmp_path):
    whole, _, folder, rows = run
    main(config_of(tmp_path, rows, 2))
    config = config_of(tmp_path, rows, STEPS)
    resumed = main(config)
    assert resumed is not None
    for mine, its in zip(jax.tree.leaves(resumed.trained), jax.tree.leaves(whole.trained), strict=True):
        np.testing.assert_array_equal(mine, its)
    assert [line["step"] for line in training_metrics(config)] == [0, 1, 2, 3]
    one, other = (load_file(place / f"adapter-{STEPS}" / "adapter_model.safetensors") for place in (tmp_path, folder))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
