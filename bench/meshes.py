"""Whether runs on other meshes end as on one device: losses and adapters after a number of steps, in float32.

    python -m bench.meshes

A small random decoder is trained on random pairs with adapters on all its layers and its head, on eight CPU devices in
every arrangement, with and without quantized weights and dropout. Each mesh lays the rows out as a run on it would.
"""

import argparse
import dataclasses
import itertools
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from lora_dpo_jax.data import PairLayout, PairTable, TokenizedPair, packed_batches, plan_layout, whole_table
from lora_dpo_jax.lora import LoraConfig, loraize, trainable_filter
from lora_dpo_jax.losses import Dpo
from lora_dpo_jax.models import CausalLM, DecoderConfig
from lora_dpo_jax.models.quantization import quantize
from lora_dpo_jax.sharding import MeshConfig, Placement
from lora_dpo_jax.training.optimizer import OptimizerConfig
from lora_dpo_jax.training.step import TrainState, TrainStep

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
    gradient_checkpointing="full",
)
EVERYWHERE = LoraConfig(r=4, alpha=8.0, target_modules=".*")  # the head too
ONE_DEVICE = MeshConfig({"data": 1})
MESHES = {
    "data 8": MeshConfig({"data": 8}),
    "model 8": MeshConfig({"data": 1, "model": 8}),
    "data 2, model 4": MeshConfig({"data": 2, "model": 4}),
    "replica 2, data 2, model 2": MeshConfig({"replica": 2, "data": 2, "model": 2}),
}


def outcome(
    config: MeshConfig, *, steps: int = 20, quantization: str = "none", dropout: float = 0.0, pairs_a_step: int = 16
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The losses of the steps, and the adapters after them, of a run on as many of the devices as `config` names."""
    devices = jax.devices()[: 1 if config == ONE_DEVICE else None]
    placement = Placement(config, devices)
    optimizer = OptimizerConfig(learning_rate=1e-3).build(steps)
    lora = dataclasses.replace(EVERYWHERE, dropout=dropout)
    state = placement.put_parameters(jax.jit(_state, static_argnums=(0, 1, 2))(lora, optimizer, quantization))
    pairs = random_pairs(4 * pairs_a_step)
    batch_ids = list(np.arange(steps * pairs_a_step).reshape(steps, -1) % len(pairs))
    layout = plan_layout(
        batch_ids, pairs.lengths, row_multiple=placement.row_shards, longest_row=128, pair_layout=PairLayout()
    )
    step = TrainStep(Dpo(), optimizer, scope=placement.scope)
    losses = []
    for batch in packed_batches(pairs, batch_ids, layout, place=placement.put_batch):
        state, metrics = step(state, batch)
        losses.append(float(metrics.values["loss"]))
    adapters = jax.tree.leaves(eqx.filter(state.model, trainable_filter(state.model)))
    return np.array(losses), [np.asarray(leaf) for leaf in adapters]


def apart(found: tuple[np.ndarray, list[np.ndarray]], wanted: tuple[np.ndarray, list[np.ndarray]]) -> tuple[float, float]:
    """The largest difference of a loss, and of an adapter: the norm of its difference relative to its norm."""
    loss = float(np.max(np.abs(found[0] - wanted[0])))
    norm = np.linalg.norm
    return loss, max(float(norm(a - b) / norm(b)) for a, b in zip(found[1], wanted[1], strict=True))


def random_pairs(count: int, *, seed: int = 0) -> PairTable:
    rng = np.random.default_rng(seed)

    def tokens(longest: int) -> np.ndarray:
        return rng.integers(0, DECODER.vocab_size, rng.integers(2, longest + 1)).astype(np.int32)

    return whole_table({"random": _Pairs([TokenizedPair(tokens(24), tokens(32), tokens(32)) for _ in range(count)])})  # pyright: ignore


class _Pairs(list):
    name = "random"

    @property
    def lengths(self) -> np.ndarray:
        return np.array([[len(tokens) for tokens in pair] for pair in self], np.int32)

    @property
    def prompt_hashes(self) -> np.ndarray:
        return np.arange(len(self), dtype=np.uint64)


def _state(lora: LoraConfig, optimizer, quantization: str) -> TrainState:
    base = CausalLM.init(DECODER, key=jax.random.key(0))
    # Large enough that attention and predictions are far from uniform.
    base = jax.tree.map(lambda leaf: leaf * 1.5 if leaf.ndim > 1 else leaf, base)
    model = loraize(quantize(base, quantization), lora, key=jax.random.key(1))
    return TrainState.init(model, optimizer, key=jax.random.key(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--meshes", nargs="*", default=list(MESHES), choices=list(MESHES))
    arguments = parser.parse_args()
    print("| weights | dropout | mesh | loss of the last step | largest difference of a loss | of an adapter |")
    print("|---|---|---|---|---|---|")
    for quantization, dropout in itertools.product(("none", "nf4"), (0.0, 0.1)):
        settings = {"steps": arguments.steps, "quantization": quantization, "dropout": dropout}
        wanted = outcome(ONE_DEVICE, **settings)
        print(f"| {quantization} | {dropout} | one device | {wanted[0][-1]:.6f} | | |", flush=True)
        for name in arguments.meshes:
            found = outcome(MESHES[name], **settings)
            loss, adapter = apart(found, wanted)
            print(f"| {quantization} | {dropout} | {name} | {found[0][-1]:.6f} | {loss:.1e} | {adapter:.1e} |", flush=True)


if __name__ == "__main__":
    main()
