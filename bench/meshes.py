"""Whether runs on other meshes end as on one device: losses and adapters after a number of steps, in float32.

    python -m bench.meshes

A small random decoder is trained on random pairs with adapters on all its layers and its head, on eight CPU devices in
every arrangement, with and without quantized weights and dropout. Each mesh lays the rows out as a run on it would.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax

from lora_dpo_jax.data import (
    ExampleTable,
    MemoryExamples,
    PackingConfig,
    PreferenceBatch,
    packed_batches,
    whole_table,
)
from lora_dpo_jax.lora import LoraConfig, loraize, trainable_filter
from lora_dpo_jax.losses import Dpo
from lora_dpo_jax.models import CausalLM, ComputeConfig, DecoderConfig
from lora_dpo_jax.models.quantization import quantize
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.runs.learner import Learner, real_learner
from lora_dpo_jax.runs.steps import lay_out_steps
from lora_dpo_jax.sharding import MeshConfig, Placement
from lora_dpo_jax.training.optimizer import OptimizerConfig
from lora_dpo_jax.training.step import TrainState

# All that a mesh splits divides by eight, after NF4 has put two outputs into a byte too.
DECODER = DecoderConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=16,
    num_kv_heads=8,
    head_dim=8,
    max_position_embeddings=256,
)
COMPUTE = ComputeConfig(gradient_checkpointing="full")
EVERYWHERE = LoraConfig(r=4, alpha=8.0, target_modules=".*")  # the head too
PAIRS_A_STEP = 16
ONE_DEVICE = MeshConfig({"data": 1})
MESHES = {
    "data 8": MeshConfig({"data": 8}),
    "model 8": MeshConfig({"data": 1, "model": 8}),
    "data 2, model 4": MeshConfig({"data": 2, "model": 4}),
    "replica 2, data 2, model 2": MeshConfig({"replica": 2, "data": 2, "model": 2}),
    # The vocabulary too, and instead of groups of heads the heads in each group.
    "data 4, model 2, other axes": MeshConfig(
        {"data": 4, "model": 2}, shared_mapping={"mlp": "model", "q_heads_per_group": "model", "vocab": "model"}
    ),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    losses: np.ndarray  # of each step
    adapters: list[np.ndarray]  # after the last one

    def apart(self, other: "Outcome") -> tuple[float, float]:
        """The largest difference of a loss, and of an adapter: the norm of its difference relative to its norm."""
        norm = np.linalg.norm
        adapters = (norm(mine - its) / norm(its) for mine, its in zip(self.adapters, other.adapters, strict=True))
        return float(np.max(np.abs(self.losses - other.losses))), float(max(adapters))


def train(config: MeshConfig, *, steps: int = 20, devices: list[Any] | None = None, **settings: Any) -> Outcome:
    """Trains on all devices, or on those given, in the order in which the mesh is to have them. Settings: `wire`'s."""
    optimizer = OptimizerConfig(learning_rate=1e-3).build(steps)
    learner, batches = wire(config, optimizer, steps=steps, devices=devices, **settings)
    losses = [float(learner(batch).values["loss"]) for batch in batches]
    return Outcome(np.array(losses), [np.asarray(leaf) for leaf in jax.tree.leaves(adapters_of(learner.state))])


def wire(
    config: MeshConfig,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    devices: list[Any] | None = None,
    lora: LoraConfig = EVERYWHERE,
    quantization: str = "none",
    dtype: str = "float32",
    compute: ComputeConfig = COMPUTE,
    row_order: list[int] | None = None,
) -> tuple[Learner, Iterator]:
    """A learner and its batches.

    `dtype` is that of the weights and of computation, `row_order` the one in which rows are dealt to the devices.
    """
    placement = Placement(config, devices)
    model = jax.jit(functools.partial(_adapted_model, lora, quantization, dtype, compute))()
    pairs = random_pairs(4 * PAIRS_A_STEP)
    ids = list(np.arange(steps * PAIRS_A_STEP).reshape(steps, -1) % len(pairs))
    shapes = lay_out_steps(pairs, ids, PackingConfig(), parallelism=1, row_shards=placement.row_shards).shapes

    def place(batch: tuple[PreferenceBatch, ...]) -> tuple[PreferenceBatch, ...]:
        if row_order is not None:
            batch = jax.tree.map(lambda leaf: leaf[:, row_order], batch)  # [micro-batch, row, ...]
        return placement.put_batch(batch)

    learner = real_learner(PreferenceObjective(Dpo()), optimizer, model, placement, key=jax.random.key(2))
    return learner, packed_batches(pairs, ids, shapes, place=place)


def adapters_of(state: TrainState) -> Any:
    return eqx.filter(state.model, trainable_filter(state.model))


def random_pairs(count: int, *, seed: int = 0) -> ExampleTable:
    rng = np.random.default_rng(seed)

    def tokens(longest: int) -> np.ndarray:
        return rng.integers(0, DECODER.vocab_size, rng.integers(2, longest + 1))

    return whole_table({"random": MemoryExamples((tokens(24), tokens(32), tokens(32)) for _ in range(count))})


def _adapted_model(lora: LoraConfig, quantization: str, dtype: str, compute: ComputeConfig) -> CausalLM:
    base = CausalLM.init(DECODER, compute, key=jax.random.key(0))
    # Large enough that attention and predictions are far from uniform.
    base = jax.tree.map(lambda leaf: (leaf * 1.5 if leaf.ndim > 1 else leaf).astype(dtype), base)
    return loraize(quantize(base, quantization), lora, key=jax.random.key(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--meshes", nargs="*", default=list(MESHES), choices=list(MESHES))
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    print("| weights | dropout | mesh | last loss | largest difference of a loss | of an adapter |")
    print("|---|---|---|---|---|---|")
    for quantization, dropout in itertools.product(("none", "nf4"), (0.0, 0.1)):
        lora = dataclasses.replace(EVERYWHERE, dropout=dropout)
        run = functools.partial(train, steps=arguments.steps, quantization=quantization, lora=lora)
        wanted = run(ONE_DEVICE, devices=jax.devices()[:1])
        print(f"| {quantization} | {dropout} | one device | {wanted.losses[-1]:.6f} | | |", flush=True)
        for name in arguments.meshes:
            found = run(MESHES[name])
            loss, adapter = found.apart(wanted)
            print(
                f"| {quantization} | {dropout} | {name} | {found.losses[-1]:.6f} | {loss:.1e} | {adapter:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
