"""Runs with the reference's log-probs from the cache are those with the reference in the step."""

import dataclasses
import json
import logging
import math
import re
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from chat_templates import CHATML
from safetensors.numpy import load_file, save_file
from tiny_runs import instruct_folder, preference_rows, read_metrics, run_config, write_rows

from lora_dpo_jax.data.order import ExampleOrder, StepIds
from lora_dpo_jax.data.packing import PreferenceBatch
from lora_dpo_jax.data.shapes import PackingConfig
from lora_dpo_jax.data.table import ExampleTable
from lora_dpo_jax.evaluation import Scorer
from lora_dpo_jax.main import evaluate
from lora_dpo_jax.main.train import main
from lora_dpo_jax.reference_cache import ReferenceCache, missing_examples
from lora_dpo_jax.runs import identity, reference_scores
from lora_dpo_jax.runs.assembly import assemble, load_data, placement_of, reference_log_probs
from lora_dpo_jax.runs.base import load_base, load_peft_adapter
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.runs.reference_scores import ReferenceLogProbs
from lora_dpo_jax.runs.steps import Steps, lay_out_steps
from lora_dpo_jax.sharding import Placement
from lora_dpo_jax.training.step import TrainStep

# PEFT asks transformers for what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROWS = preference_rows(12)
IN_ORDER = ExampleOrder((12,), seed=0, shuffle=False)
# Steps in proportion to the gradients: those of plain AdamW would blow up what is nearly zero.
SMOOTH = {"learning_rate": 0.1, "epsilon": 1.0, "lr_schedule": "constant"}


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "train.jsonl", ROWS)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many pairs the reference computes, each time it computes some for the cache."""
    counts, record = [], ReferenceCache.record

    def counting(self, examples, batches, known):
        found = record(self, examples, batches, known)
        counts.append(int((missing_examples(examples, known) & ~missing_examples(examples, found)).sum()))
        return found

    monkeypatch.setattr(ReferenceCache, "record", counting)
    return counts


@pytest.fixture
def batches(monkeypatch) -> list[PreferenceBatch]:
    """What the train steps are given, part by part."""
    given, call = [], TrainStep.__call__

    def recording(self, state, batch):
        given.extend(batch)
        return call(self, state, batch)

    monkeypatch.setattr(TrainStep, "__call__", recording)
    return given


@pytest.fixture(scope="module")
def given_adapter(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(instruct_folder())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(base, config).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("reference", ["base", "adapter"])
def test_a_cached_run_is_the_live_run(tmp_path, rows, computed, batches, given_adapter, reference):
    """Two epochs with held-out pairs; from new adapters, or from a given adapter that is its own reference."""
    given = {"initialize_from_peft": str(given_adapter)} if reference == "adapter" else {}

    def outcome(mode: str):
        config = run_config(
            tmp_path,
            rows,
            reference_log_probs=mode,
            validation_split_fraction=0.25,
            trainer__num_train_steps=None,
            trainer__num_train_epochs=2,
            trainer__id=mode,
            optimizer=SMOOTH,
            peft_save_path=str(tmp_path / mode),
            **given,
        )
        main(config)
        lines = [{name: value for name, value in line.items() if "second" not in name} for line in read_metrics(config)]
        return lines, load_file(tmp_path / mode / "adapter_model.safetensors")

    live, live_adapter = outcome("live")
    assert computed == [] and all(batch.reference is None for batch in batches)
    batches.clear()
    cached, cached_adapter = outcome("auto")
    assert sorted(computed) == [3, 9] and all(batch.reference is not None for batch in batches)
    assert len(cached) == len(live) > 6
    for ours, theirs in zip(cached, live, strict=True):
        # Rewards are differences of sums of some 100 nats, summed in another order.
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    losses = [line["train/loss"] for line in live if "train/loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 0.01
    start = load_file(given_adapter / "adapter_model.safetensors") if given else None
    for name, theirs in live_adapter.items():
        before = start[name] if start is not None else 0.0
        moved = np.abs(theirs - before).max()
        np.testing.assert_allclose(cached_adapter[name], theirs, rtol=0, atol=1e-4 * moved, err_msg=name)


def test_runs_that_differ_in_what_they_do_with_it_compute_it_once(tmp_path, rows, computed, batches):
    main(run_config(tmp_path, rows, reference_log_probs="cached", trainer__num_train_steps=3))
    assert computed == [12]
    main(
        run_config(
            tmp_path,
            rows,
            beta=0.5,
            loss={"type": "sigmoid_norm"},
            optimizer={"learning_rate": 1e-3},
            lora={"r": 2},
            data__shuffle=True,
            validation_split_fraction=0.25,
            trainer__seed=7,
            trainer__train_batch_size=3,
            trainer__id="another",
        )
    )
    assert computed == [12, 3], "the pairs of step 0, in its rows"
    assert all(batch.reference is not None for batch in batches)


def test_evaluation_takes_and_leaves_the_same_values(tmp_path, rows, computed):
    config = run_config(tmp_path, rows, validation_split_fraction=0.25)
    main(config)
    assert computed == [3]  # one epoch and nothing cached: the steps compute theirs
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}

    def scores(split: str, mode: str) -> str:
        output = tmp_path / f"{split}-{mode}.jsonl"
        settings = {"output": str(output), "split": split, "reference_log_probs": mode}
        evaluate.main(evaluate.EvaluateConfig(**fields | settings))
        return output.read_text()

    first = scores("validation", "auto")
    assert computed == [3]
    assert first == scores("validation", "live")
    scores("train", "auto")
    assert computed == [3, 9]
    main(dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, id="again")))
    assert computed == [3, 9, 4], "the pairs of step 0, in its rows"


@pytest.mark.parametrize(
    "settings",
    [
        {
            "trainer__train_batch_size": 8,
            "trainer__per_device_parallelism": 1,
            "trainer__mesh": {"axes": {"data": 4, "model": 2}},
        },
        {"model": {"gradient_checkpointing": "products", "attention": "auto"}, "trainer__seed": 5},
    ],
    ids=["several micro-batches, split weights", "a row a device"],
)
def test_policy_and_reference_start_with_the_same_scores_bit_for_bit(tmp_path, rows, computed, settings):
    """In bfloat16, and whatever rows the cached scores are of. From other rows, margins would be 0.01 nats and more."""
    bfloat16 = {"trainer__mp": "p=f32,c=bfloat16", "reference_log_probs": "cached", "data__shuffle": True}
    config = run_config(tmp_path, rows, lora__dropout=0.1, trainer__num_train_steps=3, **bfloat16 | settings)
    references, (pairs,) = references_of(config)
    assert references.cache is not None
    by_table = references.cache.compute(references.reference, Scorer(pairs, rows=4))
    run = assemble(config, placement_of(config))
    values = references.of_steps(run.steps)
    assert values is not None and computed == [12, len(run.steps.ids[0])]
    first = pairs.arrays.responses_of(np.unique(run.steps.ids[0]))
    assert (values[first] != by_table[first]).any(), "the rows do not matter here; choose others"
    metrics = run.learner(next(iter(run.steps.batches(run.learner.placement, reference=values))))
    assert float(metrics.values["rewards/margins"]) == 0.0
    for losses, ids in zip(metrics.example_losses, metrics.example_ids, strict=True):
        assert {*losses.array[ids.array >= 0].tolist()} <= {float(np.float32(math.log(2)))}


def test_nothing_is_looked_up_for_a_loss_without_reference(tmp_path, rows, computed):
    main(run_config(tmp_path, rows, loss={"reference_free": True}, reference_log_probs="cached"))
    assert computed == []
    assert not (tmp_path / "cache" / "reference").exists()


def references_of(config: TrainConfig) -> tuple[ReferenceLogProbs, list]:
    """What a run asks for its values, and the tables of its pairs."""
    data, placement = load_data(config), Placement(config.trainer.mesh)
    base = load_base(config, data.tokenizer, placement)
    model = base.model
    if config.reference_adapter is not None:
        model = load_peft_adapter(base, "initialize_from_peft", config.reference_adapter, placement)
    tables = [table for table in (data.pairs, data.held_out) if len(table)]
    return reference_log_probs(config, base, model, placement), tables


class FakeScorer:
    """Gives every pair -1 and -2."""

    def __init__(self, examples):
        self.examples = examples

    def in_batches(self, model):
        yield np.arange(len(self.examples)), np.tile(np.float32([-1.0, -2.0]), len(self.examples))


class FakeMicroBatchScorer:
    """The same for a step."""

    def __init__(self, scope):
        pass

    def __call__(self, model, micro):
        ids = np.asarray(micro.examples.ids.array)
        return ids[ids >= 0], np.tile(np.float32([-1.0, -2.0]), int((ids >= 0).sum()))


@pytest.fixture
def no_computing(monkeypatch) -> None:
    monkeypatch.setattr(reference_scores, "MicroBatchScorer", FakeMicroBatchScorer)


def steps_of(pairs: ExampleTable, ids: StepIds) -> Steps:
    return lay_out_steps(pairs, ids, PackingConfig(), parallelism=-1, row_shards=8)


def remember(config: TrainConfig) -> None:
    references, tables = references_of(config)
    for table in tables:
        assert references.cache is not None
        references.cache.compute(references.reference, FakeScorer(table))  # pyright: ignore[reportArgumentType]


def is_known(config: TrainConfig) -> bool:
    references, tables = references_of(config)
    assert references.cache is not None
    known = [~np.isnan(references.cache.find(table)) for table in tables]
    assert len({bool(value) for values in known for value in values.flat}) == 1
    return bool(known[0][0])


def model_copy(folder: Path, *, change_byte: bool = False, **config) -> str:
    folder.mkdir()
    for path in instruct_folder().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | config))
    if change_byte:
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)
    return str(folder)


def adapter_copy(folder: Path, source: Path) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    first = next(iter(tensors.values()))
    first.flat[0] = np.nextafter(first.flat[0], np.float32(9))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(folder)


NO_MATTER = {
    "beta": {"beta": 0.7},
    "loss": {"loss": {"type": "sigmoid_norm", "label_smoothing": 0.1}},
    "learning rate": {"optimizer": {"learning_rate": 1.0}},
    "seed": {"trainer__seed": 5, "data__shuffle": True},
    "split": {"validation_split_fraction": 0.5},
    "batches": {"trainer__train_batch_size": 7, "trainer__per_device_parallelism": 1},
    "length of the run": {"trainer__num_train_steps": 99},
    "mesh": {"trainer__mesh": {"axes": {"data": 4, "model": 2}}},
    "attention and checkpointing": {"model": {"attention": "auto", "gradient_checkpointing": "full"}},
    "new adapters": {"lora": {"r": 16, "dropout": 0.1}},
    "saying what is the default": {"model": {"dtype": "f32"}, "trainer__mp": "f32"},
}
MATTERS = {
    "truncation": {"train_seq_len": 60, "data__components__prefs__format": {"slice_strategy": "left"}},
    "template": {"data__components__prefs__format": {"chat_template": CHATML.replace("<|im_end|>\n", "\n")}},
    "dtype of the weights": {"model": {"dtype": "bf16"}},
    "dtype of computation": {"trainer__mp": "p=f32,c=bfloat16"},
    "dtype of computation alone": {"trainer__mp": "p=f32,c=bfloat16", "model": {"dtype": "f32"}},
}


@pytest.fixture(scope="module")
def remembered(tmp_path_factory) -> Path:
    """A folder with a cache of the base's values for the rows."""
    folder = tmp_path_factory.mktemp("remembered")
    remember(run_config(folder, write_rows(folder / "train.jsonl", ROWS)))
    return folder


def test_values_are_found_for_the_same_bytes_at_another_place(remembered, tmp_path):
    rows = remembered / "train.jsonl"
    assert is_known(run_config(remembered, rows))
    assert is_known(run_config(remembered, rows, initialize_from_hf=model_copy(tmp_path / "copy")))


@pytest.mark.parametrize("settings", NO_MATTER.values(), ids=NO_MATTER)
def test_what_shapes_no_log_prob_is_not_in_the_key(remembered, settings):
    assert is_known(run_config(remembered, remembered / "train.jsonl", **settings))


@pytest.mark.parametrize("settings", MATTERS.values(), ids=MATTERS)
def test_what_shapes_log_probs_is_in_the_key(remembered, settings):
    assert not is_known(run_config(remembered, remembered / "train.jsonl", **settings))


@pytest.mark.parametrize("change", [{"change_byte": True}, {"rms_norm_eps": 0.5}], ids=str)
def test_another_model_has_another_key(remembered, tmp_path, change):
    model = model_copy(tmp_path / "changed", **change)
    assert not is_known(run_config(remembered, remembered / "train.jsonl", initialize_from_hf=model))


def test_a_given_adapter_is_part_of_the_key_where_it_is_the_reference(remembered, tmp_path, given_adapter):
    def known(adapter, **settings):
        config = run_config(remembered, remembered / "train.jsonl", initialize_from_peft=str(adapter), **settings)
        return config, is_known(config)

    assert known(given_adapter, peft_reference="base")[1]
    config, is_there = known(given_adapter)
    assert not is_there
    remember(config)
    assert known(given_adapter)[1]
    assert not known(adapter_copy(tmp_path / "changed", given_adapter))[1]


def test_every_setting_of_the_model_that_is_not_named_harmless_is_in_the_key(remembered, monkeypatch):
    """So that one that is added later, such as a quantization, is in it too."""
    config = run_config(remembered, remembered / "train.jsonl")
    assert is_known(config)
    monkeypatch.setattr(identity, "CHANGE_NO_NUMBERS", ("attention", "dtype"))
    assert not is_known(config)


@pytest.mark.parametrize(
    "mode, known, epochs, computes, says",
    [
        ("auto", 0, 1, None, "live, in each step; the run visits its 12 pairs once, and none of them is cached"),
        ("auto", 0, 2, 12, "0 of 12 pairs found in .*; computing 12 once .the run visits each 2.0 times."),
        ("auto", 5, 1, 11, "5 of 12 pairs found in .*; computing 7 once"),
        ("auto", 12, 1, 4, "12 of 12 pairs found in [^;]*$"),
        ("cached", 0, 1, 12, "0 of 12 pairs found in .*; computing 12 once"),
        ("live", 12, 3, None, "live, in each step, as reference_log_probs asks"),
    ],
)
@pytest.mark.usefixtures("no_computing")
def test_auto_takes_the_way_of_fewer_forward_passes(
    tmp_path, rows, computed, caplog, mode, known, epochs, computes, says
):
    """The four pairs of step 0 are computed in its rows, whatever is known."""
    cached, (pairs,) = references_of(run_config(tmp_path, rows))
    assert cached.cache is not None
    if known:
        cached.cache.compute(cached.reference, FakeScorer(pairs.subset(np.arange(known))))  # pyright: ignore[reportArgumentType]
    computed.clear()
    caplog.set_level(logging.INFO)
    references, _ = references_of(run_config(tmp_path, rows, reference_log_probs=mode))
    values = references.of_steps(steps_of(pairs, StepIds(IN_ORDER, 4, num_steps=3 * epochs)))
    (line,) = (r.getMessage() for r in caplog.records if r.getMessage().startswith("reference log-probs"))
    assert re.search(says, line)
    if computes is None:
        assert values is None and computed == []
    else:
        np.testing.assert_array_equal(values, [-1.0, -2.0] * 12)
        assert computed == ([computes] if computes else [])


@pytest.mark.parametrize(
    "known, steps, is_live",
    [
        (0, StepIds(IN_ORDER, 5, num_steps=3, short_ends=True), True),
        (0, StepIds(IN_ORDER, 5, num_steps=3), True),  # filled up from the next epoch
        (0, StepIds(IN_ORDER, 5, num_steps=4, short_ends=True), False),
        (0, StepIds(IN_ORDER, 5, num_steps=4), False),
        (1, StepIds(IN_ORDER, 5, num_steps=3), False),
        (12, StepIds(IN_ORDER, 12, num_steps=1), False),
    ],
)
@pytest.mark.usefixtures("no_computing")
def test_auto_is_live_for_one_epoch_of_which_nothing_is_cached(tmp_path, rows, computed, known, steps, is_live):
    references, (pairs,) = references_of(run_config(tmp_path, rows))
    if known:
        assert references.cache is not None
        references.cache.compute(references.reference, FakeScorer(pairs.subset(np.arange(known))))  # pyright: ignore[reportArgumentType]
    found = references.of_steps(steps_of(pairs, steps))
    assert (found is None) is is_live


@pytest.mark.usefixtures("no_computing")
def test_a_run_that_goes_on_takes_the_way_that_it_took(tmp_path, rows, computed):
    references, (pairs,) = references_of(run_config(tmp_path, rows))
    once = steps_of(pairs, StepIds(IN_ORDER, 12, num_steps=1))
    assert references.of_steps(once) is None
    assert references.of_steps(once, choice="cached") is not None
    assert computed == [12]
    assert references.of_steps(once) is not None, "now all is known"
    assert references.of_steps(once, choice="live") is None


@pytest.mark.usefixtures("no_computing")
def test_a_pair_that_no_step_visits_is_not_computed(tmp_path, rows, computed):
    references, (pairs,) = references_of(run_config(tmp_path, rows, reference_log_probs="cached"))
    values = references.of_steps(steps_of(pairs, StepIds(IN_ORDER, 2, num_steps=2)))
    assert values is not None and computed == [4]
    assert np.flatnonzero(~missing_examples(pairs, values)).tolist() == [0, 1, 2, 3]


def test_interrupted_filling_ends_with_the_same_bits(tmp_path, rows, computed, monkeypatch):
    """Each pair is computed in the rows of the step that visits it first, whatever is known already."""
    left = 10**9

    class OfRows(FakeMicroBatchScorer):
        """Scores that depend on the row's other pairs."""

        def __call__(self, model, micro):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            ids, _ = super().__call__(model, micro)
            return ids, np.float32([-1000.0 * ids.sum() - i for i in range(2 * len(ids))])

    monkeypatch.setattr(reference_scores, "MicroBatchScorer", OfRows)

    def filled(name: str, interruptions: int) -> np.ndarray:
        nonlocal left
        config = run_config(tmp_path, rows, reference_log_probs="cached", data__cache_dir=str(tmp_path / name))
        references, (pairs,) = references_of(config)
        steps = steps_of(pairs, StepIds(ExampleOrder((12,), seed=1, shuffle=True), 5, num_steps=6))
        for _ in range(interruptions):
            left = 1
            with pytest.raises(KeyboardInterrupt):
                references.of_steps(steps)
        left = 10**9
        values = references.of_steps(steps)
        assert values is not None
        return values

    at_once = filled("at_once", 0)
    assert computed == [12] and not np.isnan(at_once).any()
    np.testing.assert_array_equal(filled("interrupted", 2), at_once)
    assert sum(computed) < 24, "what was computed is kept"
