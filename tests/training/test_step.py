"""What a train step changes and what it leaves alone; and that layout is only layout."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_pairs import (
    adapters_of,
    fresh,
    intermediates,
    lengths_of,
    moved,
    new_adapters,
    packed,
    random_pairs,
    table_of,
    weights_of,
)

from lora_dpo_jax.data.batches import packed_batches
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.packing import PreferenceBatch, pack
from lora_dpo_jax.data.shapes import PartShape, StepShapes, fill_rows
from lora_dpo_jax.evaluation import Scorer
from lora_dpo_jax.lora import frozen_copy, trainable_filter, unwrap_lora, with_dropout
from lora_dpo_jax.losses import Dpo, LengthNormalizedDpo
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.sharding import MeshConfig, Placement
from lora_dpo_jax.training.optimizer import OptimizerConfig
from lora_dpo_jax.training.step import TrainState, TrainStep

PAIRS = table_of(random_pairs(24, seed=5))
BATCHES = np.arange(24).reshape(3, 8)  # the pairs of three steps
LAYOUT = PartShape.of_pairs(micro_batches=1, rows=8, row_length=64, targets=128, pairs=8)
PARTS = [(1, 128), (4, 64)]  # micro-batches of one row, and its length
# The steps of plain gradient descent are the gradients themselves; those of AdamW would blow up what is nearly zero.
DESCENT = optax.sgd(0.1)
ADAMW = OptimizerConfig(learning_rate=1e-2, lr_schedule="constant").build(10)
# Each compiled once for all tests that share LAYOUT.
DESCEND = TrainStep(PreferenceObjective(Dpo()), DESCENT, schedule=lambda step: 0.5 + 0.1 * step.astype(jnp.float32))
ADAM = TrainStep(PreferenceObjective(Dpo()), ADAMW)


def tightly(ids: np.ndarray) -> list[np.ndarray]:
    return [ids[row] for row in fill_rows(PAIRS.sizes[ids].tokens.tolist(), LAYOUT.row_length)]


def one_pair_a_row(ids: np.ndarray) -> list[np.ndarray]:
    return [ids[i : i + 1] for i in range(len(ids))]


def rows_and_pairs_reversed(ids: np.ndarray) -> list[np.ndarray]:
    return [row[::-1] for row in tightly(ids)][::-1]


def by_pair(reference: np.ndarray | None):
    return None if reference is None else PAIRS.arrays.by_example(reference)


def trained(
    step: TrainStep,
    layout: PartShape = LAYOUT,
    rows_of=tightly,
    placement: Placement | None = None,
    reference: np.ndarray | None = None,
) -> dict:
    """Three steps from the same adapters: losses, gradient norms, all metrics of the last step, how adapters moved."""
    put_batch = functools.partial(jax.tree.map, jnp.asarray) if placement is None else placement.put_batch
    return trained_on(
        step, (put_batch(pack(PAIRS, rows_of(ids), layout, by_pair(reference))) for ids in BATCHES), placement
    )


def trained_on(step: TrainStep, batches: Iterable, placement: Placement | None = None) -> dict:
    attention = "dense" if placement is None else "auto"  # whose kernels work on each device's part
    state = state_of(moved(new_adapters(attention=attention)), step.optimizer)
    before = adapters_of(state.model)
    if placement is not None:
        state = placement.put_parameters(state)
    losses, norms = [], []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics.values["loss"]))
        norms.append(float(metrics.values["grad_norm"]))
    after = adapters_of(state.model)
    return {
        "losses": losses,
        "norms": norms,
        "metrics": {name: float(value) for name, value in metrics.values.items()},
        "moves": {path: after[path] - before[path] for path in before},
    }


@functools.cache
def expected() -> dict:
    return trained(DESCEND)


def assert_same(found: dict) -> None:
    wanted = expected()
    assert min(wanted["norms"]) > 0.05 and abs(wanted["losses"][0] - wanted["losses"][2]) > 1e-3
    # Means of eight float32 losses.
    np.testing.assert_allclose(found["losses"], wanted["losses"], rtol=1e-5)
    # Gradients add up over tokens, rows and devices, each time in another order.
    np.testing.assert_allclose(found["norms"], wanted["norms"], rtol=1e-4)
    for path, move in wanted["moves"].items():
        assert np.abs(move).max() > 1e-4, path
        np.testing.assert_allclose(found["moves"][path], move, rtol=1e-3, atol=1e-4 * np.abs(move).max(), err_msg=path)
    for name in wanted["metrics"].keys() & found["metrics"].keys() - {"padding_fraction"}:
        # Margins are differences of sums of some 50 nats.
        assert found["metrics"][name] == pytest.approx(wanted["metrics"][name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("rows_of", [one_pair_a_row, rows_and_pairs_reversed])
def test_packing_and_the_order_of_rows_change_nothing_and_compile_nothing(rows_of):
    expected()
    assert_same(trained(DESCEND, rows_of=rows_of))
    assert DESCEND.num_compilations == 1


def test_a_step_that_another_thread_compiled_is_not_compiled_again():
    compiled: list[str] = []

    def note(event: str, seconds: float, **about) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about["fun_name"])

    step = TrainStep(PreferenceObjective(Dpo()), DESCENT)
    state = state_of(moved(new_adapters(attention="dense")), DESCENT)
    batch = jax.tree.map(jnp.asarray, pack(PAIRS, tightly(BATCHES[0]), LAYOUT))
    jax.monitoring.register_event_duration_secs_listener(note)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(step.compile, state, batch).result()
    step(state, batch)
    assert compiled.count("jit(_update)") == step.num_compilations == 1


@pytest.mark.parametrize("rows_per_micro_batch", [1, 2])
def test_micro_batches_change_nothing(rows_per_micro_batch):
    """Eight micro-batches of a row and four of two, filled and with empty ones at the end."""
    layout = dataclasses.replace(LAYOUT, micro_batches=8 // rows_per_micro_batch, rows=rows_per_micro_batch)
    step = TrainStep(PreferenceObjective(Dpo()), DESCENT)
    assert_same(trained(step, layout, one_pair_a_row))
    assert_same(trained(step, layout, tightly))
    assert step.num_compilations == 1


def in_parts() -> Iterator[tuple[PreferenceBatch, ...]]:
    """A long row, which may stay empty, and up to four short ones."""
    layout = StepShapes(tuple(dataclasses.replace(LAYOUT, micro_batches=m, rows=1, row_length=n) for m, n in PARTS))
    return packed_batches(PAIRS, BATCHES, layout, place=functools.partial(jax.tree.map, jnp.asarray))


@pytest.mark.parametrize("batch", ["four micro-batches", "parts"])
def test_the_loss_of_each_example_is_told_by_its_id(batch):
    """Whatever its micro-batch."""

    def by_id(batch) -> dict[int, float]:
        _, metrics = TrainStep(PreferenceObjective(Dpo()), DESCENT)(state_of(moved(new_adapters()), DESCENT), batch)
        ids, losses = (
            np.concatenate([np.asarray(part.array).reshape(-1) for part in parts])
            for parts in (metrics.example_ids, metrics.example_losses)
        )
        return dict(zip(ids[ids >= 0].tolist(), losses[ids >= 0].tolist(), strict=True))

    layout = dataclasses.replace(LAYOUT, micro_batches=4, rows=2)
    several = jax.tree.map(jnp.asarray, pack(PAIRS, one_pair_a_row(BATCHES[0]), layout))
    found = by_id(next(in_parts()) if batch == "parts" else several)
    assert found == pytest.approx(by_id(batch_of(BATCHES[0])), rel=1e-4) and len(set(found.values())) == 8


def test_parts_of_different_shapes_change_nothing():
    step = TrainStep(PreferenceObjective(Dpo()), DESCENT)
    assert_same(trained_on(step, in_parts()))
    assert step.num_compilations == 1


def test_what_a_step_does_not_use_is_not_computed():
    """XLA moves out of a loop what is the same in each turn, and computes it even where there is none."""
    state = TrainState.init(moved(new_adapters()), DESCENT, key=jax.random.key(0))
    lowered = TrainStep(PreferenceObjective(Dpo(reference_free=True)), DESCENT).lower(state, next(in_parts()))
    main = lowered.compile().as_text().partition("\nENTRY ")[2]
    # The loop over the short rows, and the choice whether there is a long one. Those over layers are inside of them.
    assert (main.count(" while("), main.count(" conditional(")) == (1, 1)
    assert "dot_general" not in main


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 4, "model": 2}], ids=str)
def test_meshes_change_nothing(axes):
    placement = Placement(MeshConfig(axes))
    step = TrainStep(PreferenceObjective(Dpo()), DESCENT, scope=placement.scope)
    assert_same(trained(step, rows_of=one_pair_a_row, placement=placement))
    assert_same(trained(step, rows_of=tightly, placement=placement))
    assert step.num_compilations == 1


@functools.cache
def known_reference() -> np.ndarray:
    scores = Scorer(PAIRS, rows=2)(unwrap_lora(new_adapters()))
    return np.asarray(scores.log_probs.array)


@pytest.mark.parametrize("layout", [LAYOUT, dataclasses.replace(LAYOUT, micro_batches=4, rows=2)], ids=["one", "four"])
def test_a_reference_that_is_known_changes_nothing(layout):
    step = TrainStep(PreferenceObjective(Dpo()), DESCENT)
    found = trained(step, layout, reference=known_reference())
    # It saves work; see test_flops for how that is counted.
    assert found["metrics"].pop("flops") < 0.8 * expected()["metrics"]["flops"]
    assert_same(found)
    assert step.num_compilations == 1


def test_a_reference_that_is_known_is_not_computed():
    """The step is then as large as one without any reference."""
    state = state_of(new_adapters(), ADAMW)

    def flops(loss: Dpo, reference: np.ndarray | None) -> float:
        batch = jax.tree.map(jnp.asarray, pack(PAIRS, tightly(BATCHES[0]), LAYOUT, by_pair(reference)))
        return TrainStep(PreferenceObjective(loss), ADAMW).lower(state, batch).compile().cost_analysis()["flops"]

    without, live, known = flops(Dpo(reference_free=True), None), flops(Dpo(), None), flops(Dpo(), known_reference())
    assert live > 1.2 * without
    assert known == pytest.approx(without, rel=0.01)


def state_of(model, optimizer, **kwargs) -> TrainState:
    return TrainState.init(model, optimizer, key=jax.random.key(0), **kwargs)


def batch_of(ids) -> object:
    return jax.tree.map(jnp.asarray, pack(PAIRS, tightly(np.asarray(ids)), LAYOUT))


def test_the_loss_of_step_0_is_ln_2():
    """From new adapters, whatever the loss does with margins."""
    state, metrics = DESCEND(state_of(fresh(new_adapters()), DESCENT), batch_of(BATCHES[0]))
    assert float(metrics.values["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(metrics.values["dpo_margin_policy"]) == pytest.approx(
        float(metrics.values["dpo_margin_ref"]), abs=1e-4
    )
    assert float(metrics.values["grad_norm"]) > 0.01
    assert int(state.step) == 1
    moves = {path: np.any(new != old) for (path, new), old in zip(
        adapters_of(state.model).items(), adapters_of(new_adapters()).values(), strict=True)}  # fmt: skip
    # While B is zero, no gradient reaches A.
    assert moves == {path: path.endswith("lora_B") for path in moves}


def test_from_frozen_adapters_as_the_reference_the_loss_of_step_0_is_ln_2_too():
    step = TrainStep(PreferenceObjective(Dpo()), DESCENT)
    model = moved(new_adapters())
    state = state_of(model, DESCENT, reference=frozen_copy(model))
    held = [np.array(leaf) for leaf in jax.tree.leaves(state.reference)]
    losses, references = [], []
    for _ in range(3):
        state, metrics = step(state, batch_of(BATCHES[0]))
        losses.append(float(metrics.values["loss"]))
        references.append(float(metrics.values["dpo_margin_ref"]))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[2] < losses[1] < losses[0]
    assert len(set(references)) == 1
    for leaf, before in zip(jax.tree.leaves(state.reference), held, strict=True):
        np.testing.assert_array_equal(leaf, before)


def test_a_policy_that_is_its_reference_ties_with_it_whatever_the_rounding():
    """Before the first update, and for as long as updates move nothing."""
    model, still = moved(new_adapters()), optax.sgd(0.0)
    # As from a cache whose rows were packed in another way.
    rounding = np.random.default_rng(0).choice([-1e-5, 1e-5], known_reference().shape).astype(np.float32)
    reference = known_reference() + rounding
    known = jax.tree.map(jnp.asarray, pack(PAIRS, tightly(BATCHES[0]), LAYOUT, by_pair(reference)))
    for step, state, batch in (
        (TrainStep(PreferenceObjective(Dpo()), still), state_of(fresh(new_adapters()), still), known),
        (
            TrainStep(PreferenceObjective(Dpo()), still),
            state_of(model, still, reference=frozen_copy(model)),
            batch_of(BATCHES[0]),
        ),
    ):
        for _ in range(2):
            state, metrics = step(state, batch)
            values = {name: float(value) for name, value in metrics.values.items()}
            assert (values["dpo_accuracy"], values["rewards/accuracies"]) == (0.5, 0.0)
            assert values["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_frozen_weights_never_move_and_old_adapters_are_given_up():
    model = fresh(new_adapters())
    weights, before = weights_of(model), {path: np.array(leaf) for path, leaf in weights_of(model).items()}
    first = state = state_of(model, ADAMW)
    for ids in BATCHES:
        state, _ = ADAM(state, batch_of(ids))
    for path, leaf in weights_of(state.model).items():
        assert leaf is weights[path], path
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    adapters = eqx.filter(first.model, trainable_filter(first.model))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((adapters, first.opt_state, first.step)))
    assert not first.key.is_deleted()


def test_nothing_is_kept_or_added_up_for_frozen_weights():
    """No optimizer state and no gradient has the shape of a linear layer, of the whole stack or of one of it."""
    state = state_of(new_adapters("llama_remat"), ADAMW)  # without it, a layer's weights are kept for its backward pass
    # The head is left out: test_log_probs looks for its gradient in the compiled program, where it must not be.
    layers = {leaf.shape for path, leaf in weights_of(state.model).items() if path.endswith("_proj.wrapped.weight")}
    adapters = {value.shape for value in adapters_of(state.model).values()}
    assert len(layers) == 5  # keys and values are alike, and so are gate and up
    shapes = layers | {shape[1:] for shape in layers}
    assert not shapes & adapters
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state)} <= adapters | {()}

    jaxpr = jax.make_jaxpr(TrainStep(PreferenceObjective(Dpo()), ADAMW).__call__)(state, batch_of(BATCHES[0])).jaxpr
    computed = {(op, shape) for op, shape in intermediates(jaxpr)}
    assert any(op == "dot_general" and shape in {shape[1:] for shape in adapters} for op, shape in computed)
    sums = {"dot_general", "add", "add_any", "broadcast_in_dim", "scan", "while"}
    assert not [(op, shape) for op, shape in computed if op in sums and shape in shapes]


@pytest.mark.parametrize(
    "loss",
    [Dpo(label_smoothing=0.1), LengthNormalizedDpo(beta=2.0, reference_free=True)],
    ids=["cDPO", "reference-free sigmoid_norm"],
)
def test_every_loss_trains(loss):
    step, state, batch = (
        TrainStep(PreferenceObjective(loss), ADAMW),
        state_of(fresh(new_adapters()), ADAMW),
        batch_of(BATCHES[1]),
    )
    values = []
    for _ in range(8):
        state, metrics = step(state, batch)
        values.append({name: float(value) for name, value in metrics.values.items()})
    assert values[-1]["loss"] < 0.8 * values[0]["loss"]
    assert values[-1]["rewards/margins"] > values[0]["rewards/margins"]
    assert values[-1]["dpo_accuracy"] > values[0]["dpo_accuracy"]
    assert (values[0]["dpo_margin_ref"] == 0) == loss.reference_free


def test_a_batch_that_is_not_finite_moves_nothing_and_is_told_by_its_pairs():
    """Token 96 has no embedding but NaN, and pair 2 alone holds it."""
    pairs = [
        TokenizedExample.pair(*(np.minimum(tokens, 95) for tokens in pair.parts)) for pair in random_pairs(8, seed=6)
    ]
    pairs[2].responses[0][-1] = pairs[2].responses[1][0] = 96
    model = fresh(new_adapters())
    embedding = model.model.embed_tokens.weight
    broken = eqx.tree_at(lambda model: model.model.embed_tokens.weight, model, embedding.at["vocab", 96].set(jnp.nan))
    state = state_of(broken, ADAMW)
    before, opt_state = adapters_of(broken), [np.array(leaf) for leaf in jax.tree.leaves(state.opt_state)]
    state, metrics = ADAM(state, packed(table_of(MemoryExamples(pairs)), LAYOUT, [[i] for i in range(8)]))
    assert np.isnan(metrics.values["loss"])
    ids, losses = np.asarray(metrics.example_ids[0].array), np.asarray(metrics.example_losses[0].array)
    assert ids[np.isnan(losses) & (ids >= 0)].tolist() == [2]
    assert (int(state.step), int(state.skipped)) == (1, 1)
    assert float(metrics.values["skipped_steps"]) == 1
    for path, value in adapters_of(state.model).items():
        np.testing.assert_array_equal(value, before[path])
    for leaf, old in zip(jax.tree.leaves(state.opt_state), opt_state, strict=True):
        np.testing.assert_array_equal(leaf, old)

    others = packed(table_of(MemoryExamples(pairs)), LAYOUT, [[i] for i in range(8) if i != 2])
    state, metrics = ADAM(state, others)
    assert float(metrics.values["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert (int(state.step), int(state.skipped)) == (2, 1)
    assert any(np.any(value != before[path]) for path, value in adapters_of(state.model).items())


def test_schedules_go_by_the_updates_that_were_made():
    """The metric says what the optimizer takes: its own count does not move in a step that makes no update."""
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup=4)
    step = TrainStep(PreferenceObjective(Dpo()), optimizer.build(8), schedule=optimizer.schedule(8))
    state = state_of(fresh(new_adapters()), optimizer.build(8))
    rates = []
    for is_finite in (True, False, True, True):
        given = state
        if not is_finite:  # a weight is spoiled, for this step alone
            given = eqx.tree_at(lambda s: s.model.model.norm.weight, state, state.model.model.norm.weight * jnp.nan)
        after, metrics = step(given, batch_of(BATCHES[0]))
        rates.append(float(metrics.values["learning_rate"]))
        state = state.with_trained(after.trained)
    assert rates == pytest.approx([0.0, 2.5e-4, 2.5e-4, 5e-4])
    assert {int(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == ()} == {3}
    assert (int(state.step), int(state.skipped)) == (4, 1)


def test_dropout_is_for_the_policy_alone_and_new_in_every_step():
    still = optax.sgd(0.0)
    step = TrainStep(PreferenceObjective(Dpo()), still)

    def values(seed: int) -> list[dict[str, float]]:
        state, found = TrainState.init(with_dropout(moved(new_adapters()), 0.5), still, key=jax.random.key(seed)), []
        for _ in range(2):
            state, metrics = step(state, batch_of(BATCHES[0]))
            found.append({name: float(value) for name, value in metrics.values.items()})
        return found

    one, again, other = values(0), values(0), values(1)
    assert one == again
    assert len({round(run["loss"], 4) for run in (*one, *other)}) == 4
    assert len({run["dpo_margin_ref"] for run in (*one, *other)}) == 1


def test_dropout_is_the_same_however_the_pairs_are_laid_out():
    def run(layout: PartShape, rows_of) -> tuple[list[float], dict[str, np.ndarray]]:
        step, state = (
            TrainStep(PreferenceObjective(Dpo()), DESCENT),
            state_of(with_dropout(moved(new_adapters()), 0.5), DESCENT),
        )
        losses = []
        for ids in BATCHES:
            state, metrics = step(state, jax.tree.map(jnp.asarray, pack(PAIRS, rows_of(ids), layout)))
            losses.append(float(metrics.values["loss"]))
        return losses, adapters_of(state.model)

    wanted, wanted_adapters = run(LAYOUT, rows_and_pairs_reversed)
    found, adapters = run(dataclasses.replace(LAYOUT, micro_batches=4, rows=2), one_pair_a_row)
    assert abs(wanted[0] - expected()["losses"][0]) > 1e-3
    np.testing.assert_allclose(found, wanted, rtol=1e-5)  # as without dropout
    for path, adapter in wanted_adapters.items():
        np.testing.assert_allclose(adapters[path], adapter, rtol=1e-4, atol=1e-6, err_msg=path)


def test_metrics_say_what_was_in_the_batch():
    state = state_of(moved(new_adapters()), DESCENT)
    state = eqx.tree_at(lambda state: state.step, state, jnp.asarray(3, jnp.int32))
    ids = BATCHES[0][:5]
    _, metrics = DESCEND(state, batch_of(ids))
    values = {name: float(value) for name, value in metrics.values.items()}
    prompt, chosen, rejected = lengths_of(PAIRS)[ids].sum(axis=0)
    assert values["pairs"] == 5
    assert values["tokens"] == 2 * prompt + chosen + rejected
    assert values["padding_fraction"] == pytest.approx(1 - (prompt + chosen + rejected) / (8 * 64))
    assert values["learning_rate"] == pytest.approx(0.8)
    is_pair, losses = np.asarray(metrics.example_ids[0].array) >= 0, np.asarray(metrics.example_losses[0].array)
    assert is_pair.sum() == 5
    assert values["loss"] == pytest.approx(values["dpo_loss"], rel=1e-6)
    assert values["loss"] == pytest.approx(losses[is_pair].mean())
