import warnings

import draccus
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from tiny_pairs import tiny_decoder

from lora_dpo_jax.lora import LoraConfig, loraize, output_filter, trainable_filter
from lora_dpo_jax.training.optimizer import OptimizerConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from peft.optimizers import create_loraplus_optimizer

NUM_STEPS = 12


def transformers_schedule(config: OptimizerConfig, optimizer, num_steps: int):
    warmup = config.warmup_steps(num_steps)
    if config.lr_schedule == "constant":
        return transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    if config.lr_schedule == "linear":
        return transformers.get_linear_schedule_with_warmup(optimizer, warmup, num_steps)
    return transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, warmup, num_steps, min_lr_rate=config.min_lr_ratio
    )


def torch_trajectory(config: OptimizerConfig, params: dict, gradients: list[dict]) -> list[dict]:
    """The params after each step of torch, from `params`."""
    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    optimizer = torch.optim.AdamW(
        tensors.values(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    scheduler = transformers_schedule(config, optimizer, len(gradients))
    trajectory = []
    for gradient in gradients:
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[name])
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(tensors.values(), config.max_grad_norm)
        optimizer.step()
        scheduler.step()
        trajectory.append({name: tensor.detach().numpy().copy() for name, tensor in tensors.items()})
    return trajectory


def our_trajectory(config: OptimizerConfig, params: dict, gradients: list[dict]) -> list[dict]:
    optimizer = config.build(len(gradients))
    state = optimizer.init(params)
    trajectory = []
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
        params = eqx.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory


def random_tree(seed: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "lora_A": (scale * rng.normal(size=(3, 5))).astype(np.float32),
        "lora_B": (scale * rng.normal(size=(4, 3))).astype(np.float32),
    }


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(learning_rate=0.1, lr_schedule="constant"),
        OptimizerConfig(learning_rate=0.1, lr_schedule="constant", warmup=3, weight_decay=0.1),
        OptimizerConfig(learning_rate=0.1, lr_schedule="linear", warmup=0.2, beta1=0.8, beta2=0.95),
        OptimizerConfig(learning_rate=0.1, lr_schedule="cosine", warmup=0.25, max_grad_norm=None),
        OptimizerConfig(learning_rate=0.1, lr_schedule="cosine", min_lr_ratio=0.1, max_grad_norm=0, epsilon=1e-3),
    ],
    ids=lambda config: f"{config.lr_schedule}-warmup={config.warmup}-clip={config.max_grad_norm}",
)
def test_steps_match_torch_and_transformers(config):
    params = random_tree(seed=0)
    # Norms of about 0.005, 0.5 and 50: epsilon, the unclipped and the clipped case all matter.
    gradients = [random_tree(seed=1 + n, scale=10.0 ** (2 * (n % 3) - 3)) for n in range(NUM_STEPS)]

    theirs, ours = torch_trajectory(config, params, gradients), our_trajectory(config, params, gradients)

    for step, (their_params, our_params) in enumerate(zip(theirs, ours, strict=True)):
        for name in params:
            # optax computes 1 - beta**n in float32, where torch has float64: off by 1.3e-5 of itself at beta 0.999 and
            # n = 1, so 6e-6 of a step's size, which is at most about 0.1. The steps add up.
            atol = 1e-6 * (step + 1)
            np.testing.assert_allclose(our_params[name], their_params[name], atol=atol, err_msg=f"{step=} {name}")


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_plus_is_that_of_peft(use_dora):
    """Weight decay too, which PEFT takes under a name of its own."""
    theirs = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(6, 4)), peft.LoraConfig(r=3, use_dora=use_dora, target_modules=["0"])
    )
    settings = dict(lr=0.05, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, **settings)
    named = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    params = {next(part for part in name.split(".") if part.startswith("lora_")): p for name, p in named.items()}
    start = {name: p.detach().numpy().copy() for name, p in params.items()}
    rng = np.random.default_rng(0)
    gradients = [{name: rng.normal(size=v.shape).astype(np.float32) for name, v in start.items()} for _ in range(3)]
    config = OptimizerConfig(
        learning_rate=0.05,
        lora_plus_ratio=16.0,
        weight_decay=0.1,
        beta1=0.8,
        beta2=0.95,
        epsilon=1e-6,
        lr_schedule="constant",
        max_grad_norm=None,
    )
    ours = our_trajectory(config, start, gradients)
    for gradient, after in zip(gradients, ours, strict=True):
        for name, parameter in params.items():
            parameter.grad = torch.tensor(gradient[name])
        optimizer.step()
        for name, parameter in params.items():
            # As above: rounding of a step's size, here up to 16 times 0.05.
            np.testing.assert_allclose(after[name], parameter.detach().numpy(), atol=2e-5, err_msg=name)
    assert start.keys() == {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if use_dora else set())


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_plus_finds_the_factors_of_a_model(use_dora):
    lora = LoraConfig(r=2, use_dora=use_dora, target_modules=["q_proj", "lm_head"])
    model = eqx.filter_eval_shape(loraize, tiny_decoder(), lora, key=jax.random.key(0))
    adapters = eqx.filter(model, trainable_filter(model))
    marks = jax.tree_util.tree_leaves_with_path(output_filter(adapters))
    names = [next(entry.name for entry in path if getattr(entry, "name", "").startswith("lora_")) for path, _ in marks]
    faster = {"lora_B", "lora_magnitude_vector"}
    assert [mark for _, mark in marks] == [name in faster for name in names]
    assert len(marks) == (6 if use_dora else 4)


@pytest.mark.parametrize("warmup", [0, 1, 5, 0.1, 0.33, 50])
@pytest.mark.parametrize("lr_schedule, min_lr_ratio", [("constant", 0), ("linear", 0), ("cosine", 0), ("cosine", 0.1)])
def test_learning_rates_match_transformers(lr_schedule, min_lr_ratio, warmup):
    config = OptimizerConfig(learning_rate=3e-4, lr_schedule=lr_schedule, warmup=warmup, min_lr_ratio=min_lr_ratio)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = transformers_schedule(config, optimizer, 20)
    ours = config.schedule(20)
    for step in range(20):
        np.testing.assert_allclose(ours(step), scheduler.get_last_lr()[0], rtol=1e-5, atol=1e-10, err_msg=f"{step=}")
        optimizer.step()
        scheduler.step()


def test_fractions_of_a_run_are_counted_as_transformers_does(tmp_path):
    for fraction in (0.03, 0.1, 0.29):
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path), warmup_steps=fraction)
        for num_steps in (1, 7, 100, 1234):
            ours = OptimizerConfig(warmup=fraction).warmup_steps(num_steps)
            assert ours == arguments.get_warmup_steps(num_steps)


@pytest.mark.parametrize("lr_schedule", ["linear", "cosine"])
def test_the_rate_starts_at_zero_peaks_after_the_warmup_and_ends_at_its_minimum(lr_schedule):
    schedule = OptimizerConfig(learning_rate=1.0, lr_schedule=lr_schedule, warmup=4, min_lr_ratio=0.25).schedule(10)
    assert schedule(0) == 0
    assert schedule(4) == 1
    assert schedule(10) == schedule(11) == 0.25


@pytest.mark.parametrize("text, steps", [("warmup: 0.1", 20), ("warmup: 100", 100), ("warmup: 1.0", 1), ("{}", 0)])
def test_warmup_parses_as_a_fraction_or_a_count(text, steps):
    assert draccus.loads(OptimizerConfig, text).warmup_steps(200) == steps


@pytest.mark.parametrize("text", ["max_grad_norm: null", "max_grad_norm: 0"])
def test_clipping_can_be_switched_off(text):
    gradients = {"w": jnp.asarray([300.0, 400.0])}
    # A large epsilon makes the first step of Adam proportional to the gradient, so that a clipped one would show.
    config = draccus.loads(OptimizerConfig, text + "\nepsilon: 1e6\nlearning_rate: 1.0\nlr_schedule: constant")
    optimizer = config.build(10)
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    np.testing.assert_allclose(updates["w"], -gradients["w"] / 1e6, rtol=1e-3)


def test_state_is_float32_and_params_keep_their_dtype():
    params = {"lora_A": jnp.ones((2, 3), jnp.bfloat16), "frozen": None}
    optimizer = OptimizerConfig(learning_rate=0.5).build(10)
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    assert eqx.apply_updates(params, updates)["lora_A"].dtype == jnp.bfloat16
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert moments and all(leaf.dtype == jnp.float32 for leaf in moments)


def test_the_schedule_compiles_under_strict_dtype_promotion():
    config = OptimizerConfig(warmup=0.1, lr_schedule="cosine")
    with jax.numpy_dtype_promotion("strict"):
        rate = jax.jit(config.schedule(100))(jnp.asarray(10, jnp.int32))
    assert rate.dtype == jnp.float32
    np.testing.assert_allclose(rate, config.learning_rate)


def test_updates_without_the_adapters_are_refused():
    optimizer = OptimizerConfig().build(10)
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="needs the adapters"):
        optimizer.update(params, optimizer.init(params))


def test_the_clipped_norm_is_at_most_the_limit():
    config = OptimizerConfig(max_grad_norm=0.5, epsilon=1e6, learning_rate=1.0, lr_schedule="constant")
    optimizer = config.build(10)
    gradients = {"a": jnp.asarray([30.0]), "b": jnp.asarray([40.0])}
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    np.testing.assert_allclose(optax.tree.norm(updates) * 1e6, 0.5, rtol=1e-3)


@pytest.mark.parametrize(
    "field, value",
    [
        ("learning_rate", -1e-6),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("epsilon", 0.0),
        ("max_grad_norm", -1.0),
        ("lr_schedule", "step"),
        ("warmup", -1),
        ("warmup", 1.5),
        ("min_lr_ratio", 1.1),
        ("learning_rate", float("nan")),
        ("lora_plus_ratio", 0.0),
    ],
)
def test_errors_name_the_setting_and_the_value(field, value):
    with pytest.raises(ValueError, match=rf"optimizer\.{field}={value!r} must be "):
        OptimizerConfig(**{field: value})
