"""Each optimizer is that of optax, torch or transformers, for each matrix of a stack of layers alone."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from tiny_pairs import tiny_decoder

from lora_dpo_jax.axes import EMBED, RANK
from lora_dpo_jax.checkpoints.config import CheckpointerConfig
from lora_dpo_jax.checkpoints.store import Checkpoints
from lora_dpo_jax.dynamic_map import UNSIGNED_MAP, dynamic_code, dynamic_value
from lora_dpo_jax.lora import Adapter, LoraConfig, loraize, trainable_filter
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.sharding import MeshConfig, Placement
from lora_dpo_jax.training.optimizer import (
    OPTIMIZERS,
    Adafactor,
    AdamW,
    AdamW8bit,
    Lion,
    Muon,
    Optimizer,
    ScheduleFree,
    adapters_to_evaluate,
)
from lora_dpo_jax.training.optimizer.adamw_8bit import Blocks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes
    from etils import epath

NUM_STEPS = 4
STEPS = {"warmup": 1, "lr_schedule": "constant", "max_grad_norm": 2.0, "weight_decay": 0.1}
# DoRA and rows of tokens add arrays that are no A and no B. q_proj's outputs have two axes, and o_proj's inputs.
LORA = LoraConfig(
    r=3, use_dora=True, target_modules=["q_proj", "o_proj"], trainable_token_indices={"embed_tokens": [5]}
)


@functools.cache
def shapes(lora: LoraConfig = LORA) -> Any:
    model = eqx.filter_eval_shape(loraize, tiny_decoder(), lora, key=jax.random.key(0))
    return eqx.filter(model, trainable_filter(model))


def random_adapters(seed: int, scale: float = 1.0) -> Any:
    """A tree of adapters, or of their gradients."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), shapes())


PARAMS = random_adapters(0)
# The first is not clipped.
GRADIENTS = [random_adapters(1 + n, scale=0.01 if n == 0 else 1.0) for n in range(NUM_STEPS)]


def tensors(tree: Any) -> dict[str, np.ndarray]:
    """PEFT's tensors: a matrix or a vector of each layer."""
    found = {}
    adapters = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Adapter))
    for number, adapter in enumerate(adapters):
        for name, factor in adapter.factors.items():
            stacked = np.asarray(factor.in_order().array).reshape(-1, *factor.tensor_shape)
            found |= {f"{number}.{layer}.{name}": tensor for layer, tensor in enumerate(stacked)}
    return found


def is_low_rank(name: str) -> bool:
    return "lora_A" in name or "lora_B" in name


@functools.cache
def program(config: Optimizer) -> Callable:
    """An update of the adapters, jitted."""
    optimizer = config.build(NUM_STEPS)

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


@functools.cache
def trajectory(config: Optimizer) -> list[tuple[Any, Any]]:
    """(adapters, state) after each step."""
    params, state, found = PARAMS, jax.jit(config.build(NUM_STEPS).init)(PARAMS), []
    for gradients in GRADIENTS:
        params, state = program(config)(params, state, gradients)
        found.append((params, state))
    return found


def torch_trajectory(config: Optimizer, make: Callable[[list], list[torch.optim.Optimizer]]) -> list[dict]:
    """PEFT's tensors after each step of the optimizers that `make` returns for [(name, parameter)]."""
    parameters = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in tensors(PARAMS).items()}
    optimizers, rates, found = make([*parameters.items()]), config.schedule(NUM_STEPS), []
    for step, gradients in enumerate(GRADIENTS):
        for name, gradient in tensors(gradients).items():
            parameters[name].grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = float(rates(step))
            optimizer.step()
        found.append({name: parameter.detach().numpy().copy() for name, parameter in parameters.items()})
    return found


def numpy_trajectory(config: Optimizer, step: Callable) -> list[dict]:
    """The same in float64: `step(p, g, state, rate, number)` returns the tensor after a step; `state` is its dict."""
    params = {name: value.astype(np.float64) for name, value in tensors(PARAMS).items()}
    states, rates, found = {name: {} for name in params}, config.schedule(NUM_STEPS), []
    for number, tree in enumerate(GRADIENTS):
        gradients = {name: value.astype(np.float64) for name, value in tensors(tree).items()}
        norm = np.sqrt(sum((value**2).sum() for value in gradients.values()))
        scale = min(1.0, config.max_grad_norm / (norm + 1e-6))
        params = {
            name: step(p, scale * gradients[name], states[name], float(rates(number)), number + 1)
            for name, p in params.items()
        }
        found.append(params)
    return found


def assert_same(ours: list[Any], theirs: list[dict], *, atol: float) -> None:
    for step, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
        mine = tensors(mine)
        assert mine.keys() == its.keys()
        for name in mine:
            np.testing.assert_allclose(mine[name], its[name], atol=atol, err_msg=f"{step=} {name}")


def test_adafactor_is_that_of_transformers_for_each_layer():
    config = Adafactor(learning_rate=0.05, **STEPS)

    def make(named):
        settings = {"scale_parameter": False, "relative_step": False, "warmup_init": False, "weight_decay": 0.1}
        return [transformers.Adafactor([p for _, p in named], lr=0.05, **settings)]

    theirs = torch_trajectory(config, make)
    # A step is of 0.05, rounded to float32.
    assert_same([params for params, _ in trajectory(config)], theirs, atol=1e-6)


def test_lion_is_that_of_the_paper():
    config = Lion(learning_rate=0.05, beta1=0.8, beta2=0.9, **STEPS)

    def step(p, g, state, rate, number):
        momentum = state.setdefault("m", np.zeros_like(p))
        state["m"] = 0.9 * momentum + 0.1 * g
        return p - rate * (np.sign(0.8 * momentum + 0.2 * g) + 0.1 * p)

    assert_same([params for params, _ in trajectory(config)], numpy_trajectory(config, step), atol=1e-6)


@pytest.mark.parametrize("consistent_rms, adjust", [(0.2, "match_rms_adamw"), (None, "original")])
def test_muon_is_that_of_torch_for_each_layer(consistent_rms, adjust, monkeypatch):
    """Without Nesterov, where optax corrects the bias of the mean and torch does not; torch rounds to bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.float().clone())
    config = Muon(learning_rate=0.05, nesterov=False, consistent_rms=consistent_rms, **STEPS)

    def make(named):
        matrices = [p for name, p in named if is_low_rank(name)]
        others = [p for name, p in named if not is_low_rank(name)]
        settings = {"lr": 0.05, "weight_decay": 0.1}
        return [
            torch.optim.Muon(matrices, nesterov=False, adjust_lr_fn=adjust, eps=1e-8, **settings),
            torch.optim.AdamW(others, **settings),
        ]

    # The iterations multiply what is small by up to 3.4^5, and so its rounding.
    assert_same([params for params, _ in trajectory(config)], torch_trajectory(config, make), atol=2e-5)


def test_muon_with_nesterov_is_that_of_optax_for_each_layer():
    config = Muon(learning_rate=0.05, consistent_rms=None, **STEPS | {"max_grad_norm": None})
    theirs = optax.contrib.muon(config.schedule(NUM_STEPS), weight_decay=0.1, adam_weight_decay=0.1, nesterov=True)
    turned = lambda tree: {name: x.T for name, x in tensors(tree).items() if is_low_rank(name)}  # noqa: E731
    params, update = turned(PARAMS), jax.jit(theirs.update)
    state = theirs.init(params)
    ours = trajectory(config)
    for gradients, (mine, _) in zip(GRADIENTS, ours, strict=True):
        updates, state = update(turned(gradients), state, params)
        params = optax.apply_updates(params, updates)
        for name, tensor in turned(mine).items():
            np.testing.assert_allclose(tensor, params[name], atol=2e-5, err_msg=name)


def test_schedule_free_is_that_of_the_paper_and_its_average_is_evaluated():
    """Algorithm 1 of https://arxiv.org/abs/2405.15682, with weights of the squared largest rate as its code has."""
    config = ScheduleFree(learning_rate=0.05, **STEPS)
    averages: list[dict] = [{} for _ in range(NUM_STEPS)]
    # optax weighs a step by the rate of the next one, which only a warmup shows.
    rates = [float(config.schedule(NUM_STEPS)(number)) for number in range(1, NUM_STEPS + 1)]

    def step(y, g, state, rate, number):
        z, v, x = state.get("z", y), state.get("v", np.zeros_like(y)), state.get("x", y)
        v = 0.999 * v + 0.001 * g * g
        z = z - rate * (g / (np.sqrt(v / (1 - 0.999**number)) + 1e-8) + 0.1 * y)
        share = rates[number - 1] ** 2 / sum(one**2 for one in rates[:number])
        x = (1 - share) * x + share * z
        state |= {"z": z, "v": v, "x": x}
        averages[number - 1][len(averages[number - 1])] = x
        return 0.9 * x + 0.1 * z

    theirs, ours = numpy_trajectory(config, step), trajectory(config)
    # optax gets x from y and z anew in each step: the rounding of y is divided by 0.9.
    assert_same([params for params, _ in ours], theirs, atol=3e-6)
    evaluated = [adapters_to_evaluate(state, params) for params, state in ours]
    named = [dict(zip(tensors(PARAMS), by_order.values(), strict=True)) for by_order in averages]
    assert_same(evaluated, named, atol=3e-6)
    params, state = ours[-1]
    assert_same([evaluated[-1]], [tensors(optax.contrib.schedule_free_eval_params(state[1], params))], atol=1e-6)


def test_what_schedule_free_has_not_moved_is_evaluated_as_it_is():
    state = ScheduleFree().build(NUM_STEPS).init(PARAMS)
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), adapters_to_evaluate(state, PARAMS), PARAMS)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"schedule_free"}))
def test_other_optimizers_evaluate_what_they_train(name):
    state = jax.eval_shape(OPTIMIZERS[name]().build(NUM_STEPS).init, PARAMS)
    assert adapters_to_evaluate(state, PARAMS) is PARAMS


@pytest.mark.parametrize("signed", [False, True])
def test_codes_are_the_nearest_of_bitsandbytes_map(signed):
    table = bitsandbytes.functional.create_dynamic_map(signed=signed).numpy()
    if not signed:
        np.testing.assert_allclose(UNSIGNED_MAP, table, rtol=2e-7)
    rng = np.random.default_rng(0)
    values = (10.0 ** -rng.uniform(0, 8, 5000) * (rng.choice([-1, 1], 5000) if signed else 1)).astype(np.float32)
    values = np.concatenate([values, table, [0.0]]).astype(np.float32)
    encode = jax.jit(lambda x: dynamic_value(dynamic_code(x, signed=signed), signed=signed))
    found = np.asarray(encode(values))
    nearest = np.abs(values[:, None] - table).min(axis=1)
    # Between two values that are equally near, rounding decides.
    assert np.all(np.abs(values - found) <= nearest + 2e-7 * np.abs(values))
    assert found[-1] == 0.0


@functools.cache
def eight_bit_errors(spread: float) -> tuple[float, float, float]:
    """How far ours, and those of bitsandbytes, are from the steps of full precision, which are at most about 1.

    (root mean square of ours, of theirs, the largest of ours.) One B of 256 ranks, whose blocks are theirs too. The
    sizes of gradients in a block are exp(spread * a normal number).
    """
    rng = np.random.default_rng(0)
    shape, num_steps = (8, 256), 30
    sizes = 1e-3 * np.exp(spread * rng.normal(size=shape))
    gradients = [(sizes * (0.3 + rng.normal(size=shape))).astype(np.float32) for _ in range(num_steps)]
    parameters = {kind: torch.nn.Parameter(torch.zeros(shape)) for kind in ("full", "8 bits")}
    optimizers = [
        torch.optim.AdamW([parameters["full"]], lr=1.0, weight_decay=0.0),
        bitsandbytes.optim.AdamW8bit([parameters["8 bits"]], lr=1.0, weight_decay=0.0, min_8bit_size=1),
    ]
    adapter = loraize(jax_linear(), LoraConfig(r=256, target_modules=["linear"]), key=jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, eqx.filter(adapter, trainable_filter(adapter)))
    with_b = lambda b: eqx.tree_at(lambda tree: tree.linear.lora_B.array, zeros, jnp.asarray(b))  # noqa: E731
    optimizer = AdamW8bit(learning_rate=1.0, lr_schedule="constant", max_grad_norm=None).build(num_steps)
    update, state, found = jax.jit(optimizer.update), jax.jit(optimizer.init)(zeros), []
    for gradient in gradients:
        before = {kind: p.detach().numpy().copy() for kind, p in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = torch.tensor(gradient)
        for theirs in optimizers:
            theirs.step()
        steps = {kind: p.detach().numpy() - before[kind] for kind, p in parameters.items()}
        updates, state = update(with_b(gradient), state, zeros)
        ours = np.asarray(updates.linear.lora_B.array)
        found.append((ours - steps["full"], steps["8 bits"] - steps["full"]))
    mine, its = (np.stack(errors) for errors in zip(*found, strict=True))
    return float(np.sqrt((mine**2).mean())), float(np.sqrt((its**2).mean())), float(np.abs(mine).max())


def jax_linear() -> Any:
    import haliax as hax
    import haliax.nn as hnn

    class Model(eqx.Module):
        linear: hnn.Linear

    return Model(hnn.Linear.init(hax.Axis(EMBED, 4), hax.Axis("mlp", 8), key=jax.random.key(0), use_bias=False))


def test_8_bit_steps_are_as_near_to_full_precision_as_those_of_bitsandbytes():
    ours, theirs, largest = eight_bit_errors(0.5)
    assert ours < 1.1 * theirs
    assert ours < 0.03
    assert largest < 0.3


def test_8_bit_steps_are_nearer_where_gradients_of_a_block_differ_by_orders_of_magnitude():
    """The root of the mean of squares has half the decades of the mean, which bitsandbytes rounds."""
    ours, theirs, largest = eight_bit_errors(2.5)
    assert ours < 0.4 * theirs
    assert ours < 0.1
    assert largest < 2


def test_8_bit_state_is_a_byte_a_number_and_a_float_a_block():
    state = jax.eval_shape(AdamW8bit().build(NUM_STEPS).init, PARAMS)
    blocks = [node for node in jax.tree.leaves(state, is_leaf=_is_blocks) if _is_blocks(node)]
    assert len(blocks) == 2 * 4  # of A and B of two targets
    for node in blocks:
        assert node.codes.array.dtype == jnp.uint8
        assert node.absmax.array.dtype == jnp.float32
        assert set(node.codes.axes) - set(node.absmax.axes) == {node.codes.resolve_axis(RANK)}


def _is_blocks(node: Any) -> bool:
    return isinstance(node, Blocks)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_to_the_bit_with_each_optimizer(name, tmp_path):
    """Two steps, a checkpoint on disk, two more: the same numbers as four."""
    config = OPTIMIZERS[name](**STEPS | {"learning_rate": 0.05})
    whole = trajectory(config)
    checkpoints = Checkpoints(epath.Path(tmp_path), CheckpointerConfig(), identity={}, settings={})
    with checkpoints:
        checkpoints.save(2, whole[1], notes={}, is_last=True)
    fresh = PARAMS, jax.jit(config.build(NUM_STEPS).init)(PARAMS)
    restored = Checkpoints(epath.Path(tmp_path), CheckpointerConfig(), identity={}, settings={}).restore(fresh)
    assert restored is not None
    params, state = restored.arrays
    for gradients in GRADIENTS[2:]:
        params, state = program(config)(params, state, gradients)
    for resumed, expected in zip(jax.tree.leaves((params, state)), jax.tree.leaves(whole[-1]), strict=True):
        assert resumed.dtype == expected.dtype
        np.testing.assert_array_equal(resumed, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_split_as_the_adapters_are(name):
    placement = Placement(MeshConfig({"data": 2}), jax.devices()[:2])
    state = jax.eval_shape(OPTIMIZERS[name]().build(NUM_STEPS).init, PARAMS)
    placed = placement.abstract_parameters(state)
    named = [leaf for leaf in jax.tree.leaves(placed, is_leaf=_is_named) if _is_named(leaf) and leaf.array is not None]
    split = [leaf for leaf in named if EMBED in leaf.axis_names]
    assert split
    assert all(leaf.array.sharding.spec[leaf.axis_names.index(EMBED)] is not None for leaf in split)
    whole = sum(leaf.size for leaf in jax.tree.leaves(placed)) - sum(leaf.array.size for leaf in named)
    assert whole < 20  # all else are counters


def _is_named(node: Any) -> bool:
    return hasattr(node, "axis_names")


def test_lora_plus_is_a_faster_z_of_schedule_free():
    """Of z, which takes the steps: a faster y would leave the average of it."""
    settings = {"learning_rate": 0.05, "lr_schedule": "constant", "max_grad_norm": None}
    plain, plus = ScheduleFree(**settings), ScheduleFree(lora_plus_ratio=2.0, **settings)
    (_, slow), (_, fast) = trajectory(plain)[0], trajectory(plus)[0]
    start, slow, fast = tensors(PARAMS), tensors(slow.z), tensors(fast.z)
    for name in start:
        factor = 2.0 if "lora_B" in name or "magnitude" in name else 1.0
        np.testing.assert_allclose(fast[name] - start[name], factor * (slow[name] - start[name]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_type_is_chosen_by_file_and_command_line(name, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("initialize_from_hf: model\ndata: {components: {a: {source: {train_urls: [a.jsonl]}}}}\n")
    config = parse(TrainConfig, ["--optimizer.type", name, "--optimizer.learning_rate", "1e-4"], config_path=file)
    assert config.optimizer == OPTIMIZERS[name](learning_rate=1e-4)
    assert parse(TrainConfig, ["--optimizer.learning_rate", "1e-4"], config_path=file).optimizer == AdamW(1e-4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Adafactor(decay_rate=0.8), r"decay_rate=0.8 must be in \[-1, 0\)"),
        (lambda: Adafactor(clip_threshold=0.0), "clip_threshold=0.0 must be positive"),
        (lambda: Adafactor(epsilon=0.0), "epsilon=0.0 must be above 0"),
        (lambda: Lion(beta1=1.0), r"beta1=1.0 must be in \[0, 1\)"),
        (lambda: Lion(beta2=-0.1), r"beta2=-0.1 must be in \[0, 1\)"),
        (lambda: Muon(momentum=1.0), r"momentum=1.0 must be in \[0, 1\)"),
        (lambda: Muon(ns_steps=0), "ns_steps=0 must be at least 1"),
        (lambda: Muon(consistent_rms=0.0), "consistent_rms=0.0 must be a positive number, or null"),
    ],
)
def test_errors_name_the_setting_of_the_type(make, message):
    with pytest.raises(ValueError, match=rf"^optimizer\.{message}"):
        make()


def test_a_setting_of_another_type_is_an_error(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("initialize_from_hf: model\ndata: {components: {a: {source: {train_urls: [a.jsonl]}}}}\n")
    with pytest.raises(ValueError, match="optimizer.momentum is a setting of type muon alone, and the type here"):
        parse(TrainConfig, ["--optimizer", "{type: lion, momentum: 0.9}"], config_path=file)
