"""The benchmark measures real steps, on the same pairs for everyone, and what it compares computes the same."""

import dataclasses
import functools
import json
import math
import re
import sys
import tempfile
from pathlib import Path

import haliax as hax
import jax
import numpy as np
import pytest
from tiny_models import tiny_folder
from tiny_pairs import lengths_of

from bench import attention, compare, generation, ladder, losses, memory, micro_batches, pairs, ranked, throughput
from bench.layouts import Savings, lay_out
from bench.measure import Meter
from bench.models import decoder_config, write_folder
from bench.profiles import PROFILES, SHAPES
from bench.wiring import Model, Options, Trainer, adapted_model
from lora_dpo_jax.columns import LABEL, MISMATCHED
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.huggingface.weights import load_model, read_config
from lora_dpo_jax.losses import LOSSES
from lora_dpo_jax.models.attention import PackedMask
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.sharding import MeshConfig, Placement

ROOT = Path(__file__).parents[1]
ONE_DEVICE = jax.devices()[:1]
PROFILE = tempfile.TemporaryDirectory()  # of the step after the timed ones
DENSE = Model(attention="dense")  # compiles in half the time


def options(**changes) -> Options:
    trainer = Trainer(train_batch_size=2)
    return Options(
        **dict(shape="tiny", data="hh512", model=DENSE, pairs=4, warmup=1, steps=2, trainer=trainer) | changes
    )


@functools.cache
def measured(reference: str) -> dict:
    profile = PROFILE.name if reference == "live" else None
    return throughput.measure(options(reference=reference, profile=profile), ONE_DEVICE)


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_throughput_counts_the_tokens_of_the_steps_it_times(reference):
    result = measured(reference)
    lengths = lengths_of(pairs.load("hh512", 4, vocab_size=97))
    assert result["steps"] == 2 and result["pairs_per_step"] == 2
    assert result["tokens"] == (lengths * [2, 1, 1]).sum()  # steps 1 and 2 train on pairs 2, 3, then 0, 1 again
    # Both rates come from the same seconds, the one with four pairs.
    assert result["tokens_per_second"] / result["pairs_per_second"] == pytest.approx(result["tokens"] / 4, rel=1e-3)
    assert result["loss_first"] == pytest.approx(math.log(2), abs=1e-5)
    assert result["programs"] == 1 and result["compile_seconds"] > 0
    assert result["peak_memory_mb"] > 50 and result["temporary_memory_mb"] > 0
    assert (result["reference_seconds"] is None) == (reference == "live")
    if reference == "live":
        assert [*Path(PROFILE.name).rglob("*.xplane.pb")]
    assert json.loads(json.dumps(result)) == result


def test_attention_is_measured_next_to_a_dense_one():
    sizes = dict(rows=2, length=1024, kv_heads=1, group=2, head_size=16, dtype="float32", data="hh512", steps=1)
    options = attention.Options(**sizes, attention="dense")  # compiles in half the time
    result = attention.measure(options)
    assert result["milliseconds"] > 0 and result["dense_milliseconds"] > 0
    batch = attention.packed_rows(options)
    allowed = PackedMask(batch.segment_ids, batch.branch_ids, batch.position_ids).allowed(None)
    scores = float(hax.sum(hax.where(batch.segment_ids > 0, allowed, False)).scalar())
    assert result["share_of_dense_scores"] == pytest.approx(scores / (2 * 1024 * 1025 / 2), abs=1e-4)


def test_the_cost_of_a_micro_batch_is_told_apart_from_that_of_its_tokens():
    seconds = [0.01 * count + 0.002 * 4096 for count in (16, 2)]
    found = micro_batches.fixed_cost((16, 2), seconds, 4096)
    assert (found["fixed_milliseconds"], found["microseconds_of_token"], found["micro_batch_tokens"]) == (10, 2000, 5)


def test_micro_batches_are_measured_on_rows_without_padding():
    trainer = micro_batches.OneStep(train_batch_size=4)
    options = micro_batches.Options(shape="tiny", model=DENSE, trainer=trainer, pair_tokens=256, pairs_of_rows=[1, 4])
    options = dataclasses.replace(options, warmup=1, steps=1)
    result = micro_batches.measure(options, ONE_DEVICE)
    assert (result["row_tokens"], result["micro_batches"]) == ([256, 1024], [4, 1])
    (batch,) = micro_batches.batch_of(options, Placement(MeshConfig(), ONE_DEVICE), 4)
    assert (batch.segment_ids.array > 0).all() and (batch.target_response.array >= 0).all()
    with pytest.raises(
        ValueError, match=r"train_batch_size=4 must be a multiple of 3 pairs \(pairs_of_rows\) x 1 rows"
    ):
        micro_batches.batch_of(options, Placement(MeshConfig(), ONE_DEVICE), 3)


def test_memory_is_that_of_the_devices_asked_for():
    """Sixteen chips hold a sixteenth of the weights; and memory grows with the row, not with its square."""
    options = memory.Options(shape="tiny", topology="v5e:4x4", row_lengths=[1024, 2048])
    placement = memory.placement(options)
    short, long = (memory.measure(options, placement, parts) for parts in memory.batches(options, placement))
    assert short["rows"] == "2 x 16 x 1024"
    assert long["temporary_mb"] < 2.5 * short["temporary_mb"]
    assert not any("2048,2048" in name for name in long["largest_arrays"]), "dense attention's mask is found here"
    state = memory.learner_of(options, placement).state
    of_a_device = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.model)
    )
    assert of_a_device < 1e6 * short["arguments_mb"] < 8 * of_a_device, "arrays are padded to tiles on a TPU"
    assert all(re.fullmatch(r"\w+\[[\d,]+\]", name) for name in short["largest_arrays"])


def test_ranked_lists_and_their_pairs_hold_the_same_comparisons(tmp_path):
    lists = pairs.ranked(PROFILES["uf512"], 2, 4, vocab_size=97)
    apart = pairs.as_pairs(lists)
    assert len(apart) == 12 and all(pair.is_pair for pair in apart)
    for number, (chosen, rejected) in enumerate(lists[1].comparisons):
        pair = apart[6 + number]
        assert pair.prompt is lists[1].prompt
        assert pair.responses[0] is lists[1].responses[chosen] and pair.responses[1] is lists[1].responses[rejected]
    loaded = pairs.load("uf512", 12, vocab_size=97, responses=4, apart=True)
    assert [pair.size for pair in loaded] == [pair.size for pair in apart]
    together, as_rows = list(ranked.commands(ranked.Options(shape="tiny", work=str(tmp_path))).values())
    assert "--pairs=8" in together and "--pairs=48" in as_rows
    assert "--trainer.train_batch_size=2" in together and "--trainer.train_batch_size=12" in as_rows


def test_a_step_of_every_loss_is_timed_on_the_same_tokens():
    variants = losses.variants()
    assert {type(change["loss"]) for change in variants.values() if "loss" in change} == set(LOSSES.values())
    drawn = pairs.load("hh512", 3, vocab_size=97)
    for mismatched in (False, True):
        answers = losses.labelled(drawn, mismatched=mismatched)
        assert [answer.size for answer in answers] == [pair.size for pair in drawn]
        labels = answers.arrays.columns[LABEL]
        assert labels.per_response and labels.values.tolist()[1::2] == [MISMATCHED if mismatched else 1.0] * 3


def test_completions_are_measured_beside_those_of_transformers():
    options = generation.Options(model=str(tiny_folder("smollm2")), data=str(ROOT / "examples/quickstart/test.jsonl"))
    options = dataclasses.replace(options, prompts=2, tokens=3, rounds=1)
    row = generation.measure(options, generation.read_prompts(options), stopping=False)
    assert (row["tokens"], row["equal_completions"], row["prompts"]) == (6, 2, 2)
    assert row["ratio"] == pytest.approx(row["ours_tokens_per_second"] / row["theirs_tokens_per_second"], rel=0.05)
    assert "| off | 6 |" in generation.markdown([row])


def test_a_cached_reference_trains_alike():
    live, cached = measured("live"), measured("cached")
    assert abs(live["loss_last"] - math.log(2)) > 1e-4  # something was learned
    # The reference comes from rows of other lengths: its sums of some 200 nats have another order.
    assert cached["loss_last"] == pytest.approx(live["loss_last"], abs=2e-5)


def test_every_rung_of_the_ladder_has_the_same_loss_and_gradients():
    settings = ladder.Options(
        shape="tiny", data="hh512", model=DENSE, warmup=1, steps=1, trainer=Trainer(train_batch_size=4, mp="f32")
    )
    rungs = ladder.climb(settings, ONE_DEVICE)
    assert [rung.name for rung in rungs] == [rung.name for rung in ladder.RUNGS]
    assert abs(rungs[0].loss - math.log(2)) > 1e-4  # adapters that are not zero: there is something to compare
    assert all(np.abs(gradient).max() > 1e-4 for gradient in rungs[0].gradients)
    ladder.check(rungs, 1e-5)
    with pytest.raises(SystemExit, match=r"\+ shared prefix"):
        rungs[2].gradients = [gradient * 1.001 for gradient in rungs[2].gradients]
        rungs[2].gradient_difference = ladder._distance(rungs[2].gradients, rungs[0].gradients)
        ladder.check(rungs, 1e-5)
    predicted = [rung.predicted_gflop for rung in rungs]
    assert predicted == sorted(predicted, reverse=True) and len(set(predicted)) == len(predicted)
    assert len(ladder.markdown(rungs).splitlines()) == 2 + len(rungs)


def test_layouts_compute_what_their_names_say():
    table = list(pairs.load("hh512", 6, vocab_size=97))
    longest = max(pair.length for pair in table)
    real = pairs.real_tokens(MemoryExamples(table).arrays.sizes)
    targets = sum(sum(map(len, pair.responses)) for pair in table)

    def computed(batch) -> tuple[int, int]:
        """Tokens of some segment, and positions that reach the head."""
        return int((batch.segment_ids.array > 0).sum()), int((batch.target_response.array >= 0).sum())

    padded = lay_out(table, Savings(packing=False, shared_prefix=False, response_only=False))
    assert computed(padded) == (6 * 2 * longest, padded.tokens.array.size)
    assert computed(lay_out(table, Savings(shared_prefix=False))) == (real, targets)
    assert computed(lay_out(table, Savings())) == (sum(pair.size for pair in table), targets)


def test_pairs_of_a_profile_are_always_the_same():
    for name, profile in PROFILES.items():
        few, many = (pairs.load(name, count, vocab_size=32000) for count in (5, 40))
        assert all(np.array_equal(a, b) for i in range(5) for a, b in zip(few[i].parts, many[i].parts, strict=True))
        # A smaller vocabulary changes the ids, not the lengths.
        other = pairs.load(name, 40, vocab_size=97)
        np.testing.assert_array_equal(lengths_of(other), lengths_of(many))
        assert max(int(part.max()) for pair in other for part in pair.parts) < 97
        assert all(pair.length <= profile.cap for pair in many)
    # Figures measured on these pairs, here and elsewhere, can be compared.
    lengths = lengths_of(pairs.load("uf512", 4, vocab_size=32000))
    assert lengths.tolist() == [[67, 127, 185], [83, 100, 26], [110, 237, 56], [217, 140, 63]]


def test_pairs_that_are_written_for_the_peers_come_back(tmp_path):
    table = pairs.load("hh512", 5, vocab_size=97)
    pairs.write_jsonl(table, tmp_path / "pairs.jsonl")
    again = pairs.load_jsonl(tmp_path / "pairs.jsonl", 3)
    assert all(np.array_equal(a, b) for i in range(3) for a, b in zip(again[i].parts, table[i].parts, strict=True))
    with pytest.raises(ValueError, match="holds 5 pairs; 6 were asked for"):
        pairs.load_jsonl(tmp_path / "pairs.jsonl", 6)


def test_pairs_of_a_file_are_read_as_for_training(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_DPO_JAX_CACHE", str(tmp_path))
    example = ROOT / "examples" / "quickstart"
    tokenizer = str(example / "model")
    table = pairs.load(str(example / "train.jsonl"), 8, vocab_size=10**6, tokenizer=tokenizer, cap=256)
    assert len(table) == 8 and lengths_of(table).min() > 0
    with pytest.raises(ValueError, match="the model embeds only 97"):
        pairs.load(str(example / "train.jsonl"), 8, vocab_size=97, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="tokenizer must name"):
        pairs.load(str(example / "train.jsonl"), 8, vocab_size=97)
    with pytest.raises(ValueError, match="neither a file nor one of the profiles"):
        pairs.load("no such file", 8, vocab_size=97)


def test_one_setting_given_leaves_the_other_defaults():
    given = parse(Options, ["--trainer.mp", "f32", "--lora.r", "64", "--model.attention", "dense"])
    assert (given.trainer.mp, given.lora.r, given.model.attention) == ("f32", 64, "dense")
    assert given.trainer.train_batch_size == Options().trainer.train_batch_size == 4
    assert given.lora.alpha == 32.0 and given.model.gradient_checkpointing == "products"


def test_a_written_model_is_one_that_loads(tmp_path):
    folder = write_folder("tiny", tmp_path / "tiny")
    model = load_model(folder, read_config(folder), dtype="float32")
    assert model.config == decoder_config("tiny")
    assert float(np.std(model.model.embed_tokens.weight.array)) == pytest.approx(0.02, rel=0.05)
    np.testing.assert_array_equal(
        adapted_model(options(shape=str(folder)), Placement(MeshConfig(), ONE_DEVICE)).model.norm.weight.array, 1.0
    )
    assert write_folder("tiny", folder) == folder  # and is not written again


@pytest.mark.parametrize("shape, millions", [("22m", 19.3), ("135m", 134.5), ("1b", 1235.8), ("8b", 8030.3)])
def test_shapes_have_the_parameters_of_the_models(shape, millions):
    config = decoder_config(shape)
    assert {name for name in SHAPES if "-" not in name} == {"tiny", "22m", "135m", "1b", "8b"}
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    layer = 2 * hidden * heads + 2 * hidden * keys + 3 * hidden * config.intermediate_size + 2 * hidden
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    assert (config.num_layers * layer + embeddings + hidden) / 1e6 == pytest.approx(millions, abs=0.1)


def result(tokens_per_second: float, cpu_seconds: float, memory: float) -> dict:
    figures = {"tokens_per_second": tokens_per_second, "cpu_seconds_per_step": cpu_seconds, "peak_memory_mb": memory}
    return figures | {"versions": {"x": "1.0"}, "device": "a CPU"}


def test_ratios_are_of_medians_and_above_one_where_ours_is_better():
    results = {
        compare.OURS: [result(300, 2.0, 1000), result(100, 9.0, 1000), result(310, 1.0, 1200)],
        "trl": [result(100, 6.0, 4000), result(90, 6.5, 4000), result(900, 0.1, 1.0)],
    }
    compared = compare.compare(results)
    assert list(compared["medians"][compare.OURS].values()) == [300, 2.0, 1000]
    assert compared["ratios"] == {"trl": {"tokens_per_second": 3.0, "cpu_seconds_per_step": 3.0, "peak_memory_mb": 4.0}}
    ours, trl = compare.markdown(compared).splitlines()[2:]
    assert "| 300.0 |" in ours and "3.00x" not in ours
    assert "| 100.0 | 3.00x |" in trl and "x 1.0" in trl


def test_systems_take_turns(tmp_path):
    """Each in a process of its own, which writes what it measured."""
    script = "import json, sys, pathlib; pathlib.Path(sys.argv[-1]).write_text(json.dumps({'argv': sys.argv[1]}))"
    commands = {name: [sys.executable, "-c", script, name] for name in (compare.OURS, "peer")}
    results = compare.measure_in_turns(commands, 2, tmp_path)
    assert results == {name: [{"argv": name}] * 2 for name in commands}
    failing = {"peer": [sys.executable, "-c", "raise SystemExit('no memory')"]}
    with pytest.raises(SystemExit, match="peer failed with exit code 1(.|\n)*no memory"):
        compare.measure_in_turns(failing, 1, tmp_path)


def test_the_warm_up_does_not_count(monkeypatch):
    now = iter([0.0, 10.0, 11.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    meter = Meter(warmup=1)
    for _ in range(3):
        meter.end_step()
    monkeypatch.undo()
    report = meter.report([100, 300], pairs_per_step=2)
    assert report["seconds_per_step"] == 2.0 and report["warmup_seconds"] == 10.0
    assert report["tokens_per_second"] == 100.0 and report["pairs_per_second"] == 1.0
