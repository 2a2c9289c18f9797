"""The start of EVA: the adapters of a run at the principal components of their layers' inputs on its first examples."""

import functools
import itertools
import math
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp

from lora_dpo_jax.data.packing import PreferenceBatch
from lora_dpo_jax.lora import LoraConfig, TokenKey, layer_names, matching_names, trainable_filter
from lora_dpo_jax.lora.eva import with_principal_inputs
from lora_dpo_jax.models import CausalLM, PackedMask
from lora_dpo_jax.runs.steps import Steps
from lora_dpo_jax.sharding import Placement
from lora_dpo_jax.training.step import micro_batches

EXAMPLES = 256  # whose responses are looked at


def with_eva(
    policy: CausalLM, base: CausalLM, lora: LoraConfig, steps: Steps, placement: Placement, *, batch_size: int, key
) -> CausalLM:
    """The policy, whose adapters are new, with A at the components of the first EXAMPLES of `steps`.

    The head's inputs are not looked at: its adapter keeps its start.
    """
    targets = [name for name in matching_names(layer_names(base).modules, lora) if name != "lm_head"]
    count = min(len(steps), math.ceil(EXAMPLES / batch_size))
    batches = list(itertools.islice(steps.batches(placement), count))

    def sums(probed: CausalLM) -> CausalLM:
        micros = [micro for batch in batches for micro in micro_batches(batch)]
        with placement.scope():
            found = [_sums_of(probed, micro) for micro in micros]
        return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), found)

    rank = max(lora.r, *lora.rank_pattern.values(), 0)
    return with_principal_inputs(base, policy, targets, rank, sums, key=key)


@eqx.filter_jit
def _sums_of(probed: CausalLM, micro: PreferenceBatch) -> Any:
    """The gradients of the probes on the tokens of responses."""
    probes, weights = eqx.partition(probed, trainable_filter(probed))
    shown = ((micro.segment_ids > 0) & (micro.branch_ids > 0)).astype(jnp.float32)
    mask = PackedMask(micro.segment_ids, micro.branch_ids, micro.position_ids)
    key = TokenKey(jax.random.key(0), (shown,))

    def loss(probes: Any) -> jax.Array:
        model = eqx.combine(probes, weights)
        return hax.sum(model.model(micro.tokens, micro.position_ids, mask, key=key).hidden).scalar().astype(jnp.float32)

    return jax.grad(loss)(probes)
