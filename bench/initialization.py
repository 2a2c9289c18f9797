"""How far the order of sums alone steers a run that begins where policy and reference are equal.

    python -m bench.initialization

The model, pairs and steps of `bench.meshes` on eight CPU devices, arranged in several ways that differ in nothing but
the order in which gradients are summed. What differs in the end is what that order decided. Weights and computation are
in float32 or bfloat16; adapters, their gradients' sums and the optimizer in float32 always, as in a run.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax

from bench.meshes import EVERYWHERE, MESHES, adapters_of, wire
from lora_dpo_jax.lora import trainable_filter
from lora_dpo_jax.sharding import MeshConfig
from lora_dpo_jax.training.optimizer import OptimizerConfig
from lora_dpo_jax.training.step import TrainState, TrainStep

IN_ORDER, PERMUTED = [0, 1, 2, 3, 4, 5, 6, 7], [5, 2, 7, 0, 3, 6, 1, 4]
# Name -> the mesh, its devices, and the order in which rows are dealt to these, if it is another than their own.
ARRANGEMENTS: dict[str, tuple[MeshConfig, list[int], list[int] | None]] = {
    "data 8": (MESHES["data 8"], IN_ORDER, None),
    "data 8, devices permuted": (MESHES["data 8"], PERMUTED, None),
    "data 8, rows permuted": (MESHES["data 8"], IN_ORDER, PERMUTED),
    "model 8": (MESHES["model 8"], IN_ORDER, None),
    "data 2, model 4": (MESHES["data 2, model 4"], IN_ORDER, None),
}
DEFAULT = OptimizerConfig(learning_rate=1e-3, lr_schedule="constant")
# Name -> what starts at zero, and the optimizer.
SETTINGS: dict[str, tuple[str, OptimizerConfig]] = {
    "B zero (the default)": ("random", DEFAULT),
    "A zero": ("zero", DEFAULT),
    "B zero, 4 steps of warmup": ("random", dataclasses.replace(DEFAULT, warmup=4)),
    "B zero, epsilon 1e-5": ("random", dataclasses.replace(DEFAULT, epsilon=1e-5)),
    "B zero, epsilon 1e-3": ("random", dataclasses.replace(DEFAULT, epsilon=1e-3)),
    "A zero, 4 steps of warmup": ("zero", dataclasses.replace(DEFAULT, warmup=4)),
}


@dataclass(frozen=True)
class Run:
    first_gradient: np.ndarray  # of all adapters, of what is not zero alone
    first_move: np.ndarray  # of all adapters, by the first update that moves any
    last: np.ndarray  # the adapters, less what they were at first
    losses: np.ndarray


class Arrangement:
    """A step compiled once for all settings: it gives the gradients, and the optimizer is applied outside of it."""

    def __init__(self, name: str, dtype: str, steps: int):
        self.mesh, devices, row_order = ARRANGEMENTS[name]
        self.steps = steps
        self.settings = {
            "devices": [jax.devices()[index] for index in devices],
            "row_order": row_order,
            "dtype": dtype,
        }
        self.step: TrainStep | None = None

    def run(self, a_init: Any, config: OptimizerConfig) -> Run:
        lora = dataclasses.replace(EVERYWHERE, a_init=a_init)
        learner, batches = wire(self.mesh, RECORD, steps=self.steps, lora=lora, **self.settings)
        self.step = self.step or learner.step
        return _summary(list(_trained(self.step, learner.state, batches, config.build(self.steps))))


def _record() -> optax.GradientTransformation:
    """Moves nothing and keeps the gradients in its state."""
    zeros = optax.tree.zeros_like
    return optax.GradientTransformation(zeros, lambda gradients, _, params=None: (zeros(gradients), gradients))


RECORD = _record()


def _trained(
    step: TrainStep, state: TrainState, batches: Iterator, optimizer: optax.GradientTransformation
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """(gradients, adapters before the update, loss) of each step, and the last adapters."""
    update = jax.jit(optimizer.update)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, adapters_of(state))
    adapters = jax.tree.map(np.asarray, adapters_of(state))
    opt_state = optimizer.init(adapters)
    gradients, loss = None, float("nan")
    for batch in batches:
        state, metrics = step(state, batch)
        # On one device and in one order, whatever the arrangement.
        gradients, loss = jax.tree.map(np.asarray, state.opt_state), float(metrics.values["loss"])
        yield _flat(gradients), _flat(adapters), loss
        updates, opt_state = update(gradients, opt_state, adapters)
        adapters = jax.tree.map(np.asarray, optax.apply_updates(adapters, updates))
        placed = jax.device_put(adapters, shardings)
        weights = eqx.filter(state.model, trainable_filter(state.model), inverse=True)
        state = dataclasses.replace(state, model=eqx.combine(placed, weights))
    yield _flat(gradients), _flat(adapters), loss


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _summary(steps: list[tuple[np.ndarray, np.ndarray, float]]) -> Run:
    gradients, adapters, losses = zip(*steps, strict=True)
    moves = (after - adapters[0] for after in adapters[1:])
    first_move = next(move for move in moves if np.any(move))
    return Run(gradients[0], first_move, adapters[-1] - adapters[0], np.array(losses[:-1]))


def compare(run: Run, first: Run) -> dict[str, float]:
    """How far a run is from the first: norms of differences relative to norms, but for losses."""

    def apart(of: str) -> float:
        ours, theirs = getattr(run, of), getattr(first, of)
        return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

    moved = first.first_gradient != 0
    signs = np.sign(run.first_gradient[moved]) != np.sign(first.first_gradient[moved])
    return {
        "first gradient": apart("first_gradient"),
        "of other sign": float(np.mean(signs)),
        "first update": apart("first_move"),
        "adapters in the end": apart("last"),
        "losses": float(np.max(np.abs(run.losses - first.losses))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    header = ["computed in", "init, optimizer", "arrangement", "first gradient", "of other sign", "first update"]
    header += ["adapters in the end", "losses", "last loss"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for dtype in arguments.dtypes:
        arrangements = {name: Arrangement(name, dtype, arguments.steps) for name in ARRANGEMENTS}
        for setting, (a_init, config) in SETTINGS.items():
            runs = {name: arrangement.run(a_init, config) for name, arrangement in arrangements.items()}
            first, *others = runs
            for name in others:
                found = [*compare(runs[name], runs[first]).values(), runs[name].losses[-1]]
                figures = " | ".join(f"{value:.2g}" for value in found)
                print(f"| {dtype} | {setting} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
