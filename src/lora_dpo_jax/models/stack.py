"""The layers of a decoder in order. Layers of the same kind share stacked arrays and one compiled body.

    layers: full x 32                layers: (window x 5, full) x 2, window x 2

    segments                         segments
      0: Stacked {layers: 32}          0: Stacked {layers: 2}     one body for the whole period
         layers                           layers
           0                                0 ... 5
                                       1: Stacked {layers: 2}     the remaining layers
                                          layers
                                            0

Tensor names follow from this layout: on the right, layer 7 is slice 1 of layer 1 of segment 0.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
from haliax import Axis, NamedArray
from haliax.nn.scan import ScanCheckpointPolicy
from jax.ad_checkpoint import checkpoint_name

from lora_dpo_jax.axes import LAYERS
from lora_dpo_jax.lora import TokenKey
from lora_dpo_jax.models.compute import CHECKPOINT_POLICIES, ComputeConfig
from lora_dpo_jax.models.in_stack import without_experts

LONGEST_PERIOD = 16  # layers
LAYER_INPUT = "input_of_a_layer"  # the name of what scans over periods keep


class Period(eqx.Module):
    """Consecutive layers that may differ from each other."""

    layers: tuple[Any, ...]


class LayerStack(eqx.Module):
    """Segments of layers. Each segment is a scan over its repeating period."""

    segments: tuple[hnn.Stacked[Period], ...]
    compute: ComputeConfig = eqx.field(static=True)
    is_unrolled: bool = eqx.field(static=True, default=False)  # see `unrolled`

    @staticmethod
    def init(make_layer: Callable, kinds: Sequence[Hashable], compute: ComputeConfig, *, key) -> "LayerStack":
        """Makes a layer `make_layer(kind, key=...)` for each of `kinds`. Layers of equal kinds may share a program."""
        keys = jax.random.split(key, len(kinds))
        segments, first = [], 0
        for period, repeats in periods(kinds):
            here = keys[first : first + len(period) * repeats].reshape(repeats, len(period))
            first += len(period) * repeats
            policy = compute.checkpoint_policy if len(period) == 1 else _policy_around_layers(compute)

            def make(keys, *, period=period) -> Period:
                return Period(tuple(make_layer(kind, key=keys[i]) for i, kind in enumerate(period)))

            Layers = Axis(LAYERS, repeats)
            segments.append(hnn.Stacked(hax.vmap(make, Layers)(here), Layers, policy))
        return LayerStack(tuple(segments), compute)

    def scan(
        self, body: Callable, carry: Any, shared: Any, *, keys: TokenKey | None = None, own: Any = None
    ) -> tuple[Any, list[Any]]:
        """Calls `carry, output = body(layer, carry, shared, its key, its part of own)` for each layer in order.

        `own` holds arrays for each layer of each segment's period, with the axis of the segment first, unless the stack
        is unrolled. The outputs have the same structure.
        """
        per_layer = self._per_layer(body)

        def of_period(period: Period, carry, shared, keys, own):
            outputs = []
            for i, layer in enumerate(period.layers):
                if len(period.layers) > 1:
                    carry = jax.tree.map(lambda leaf: checkpoint_name(leaf, LAYER_INPUT), carry)
                key = None if keys is None else TokenKey(keys.key[i], keys.token)
                carry, output = per_layer[len(period.layers) > 1](
                    layer, carry, shared, key, None if own is None else own[i]
                )
                outputs.append(output)
            return carry, tuple(outputs)

        all_keys = None if keys is None else jax.random.split(keys.key, self.num_layers)
        first, outputs = 0, []
        for number, segment in enumerate(self.segments):
            repeats, size = segment.Block.size, len(segment.stacked.layers)
            here = None
            if keys is not None and all_keys is not None:
                here = TokenKey(all_keys[first : first + repeats * size].reshape(repeats, size), keys.token)
            first += repeats * size
            of_segment = None if own is None else own[number]
            if self.is_unrolled:
                carry, output = of_period(_layer_of(segment.stacked, 0), carry, shared, here, of_segment)
            else:
                stacked: Any  # haliax's type hints lack the further arguments of a scanned function
                stacked, restored = without_experts(segment)

                def of_slice(period: Period, *rest, restored=restored):
                    return of_period(restored(period), *rest)

                carry, output = stacked.scan_via(of_slice)(carry, shared, here, of_segment)
            outputs.append(output)
        return carry, outputs

    def unrolled(self) -> "LayerStack":
        """The same layers as one period that is not repeated, for inference. Its arrays are slices, {layers: 1, ...}.

        A program of it has the code of every layer, and no loop that would copy a slice of each stack in each turn.
        """
        layers = tuple(
            _layer_of(layer, slice(repeat, repeat + 1))
            for segment in self.segments
            for repeat in range(segment.Block.size)
            for layer in segment.stacked.layers
        )
        compute = dataclasses.replace(self.compute, gradient_checkpointing="none")
        whole = hnn.Stacked(Period(layers), Axis(LAYERS, 1), compute.checkpoint_policy)
        return LayerStack((whole,), compute, is_unrolled=True)

    @property
    def num_layers(self) -> int:
        return sum(segment.Block.size * len(segment.stacked.layers) for segment in self.segments)

    def of_layers(self, fn: Callable[[tuple[Axis, ...], Any], Any]) -> tuple[tuple[Any, ...], ...]:
        """fn(axes of the segment, layer) for each layer of each segment's period, structured as `own` in `scan`."""
        segments = [(() if self.is_unrolled else (s.Block,), s.stacked.layers) for s in self.segments]
        return tuple(tuple(fn(stack, layer) for layer in layers) for stack, layers in segments)

    def numbers(self, path: Sequence[Any]) -> tuple[range, int]:
        """For `tensor_names.tensor_names`: the numbers of the layers that an array holds slices of.

        `path` leads from this stack to the array. Also returns how many entries of `path` lead to the layer.
        """
        _, segment, _, _, position, *_ = path  # segments, [s], stacked, layers, [i]
        before = self.segments[: segment.idx]
        first = sum(s.Block.size * len(s.stacked.layers) for s in before) + position.idx
        here = self.segments[segment.idx]
        size = len(here.stacked.layers)
        return range(first, first + size * here.Block.size, size), 5

    def _per_layer(self, body: Callable) -> tuple[Callable, Callable]:
        """`body` for periods of one layer, which the scan checkpoints, and a checkpointed one for longer periods."""
        if self.compute.gradient_checkpointing == "none":
            return body, body
        policy = CHECKPOINT_POLICIES["products" if self.compute.gradient_checkpointing == "products" else "full"]
        # A barrier holds each layer's recomputation until its gradient is at hand. Without it, XLA may compute all
        # layers of a period again before it uses the first one, and holds the activations of all.
        return body, dataclasses.replace(policy, prevent_cse=True).checkpoint("layer_carry", "layer_input", body)


def arranged(own: Any, like: Any) -> Any:
    """`own` of a stack, in the structure of `like`: that of the same stack, or that of the unrolled one."""
    if [len(of_segment) for of_segment in own] == [len(of_segment) for of_segment in like]:
        return own
    of_layers = (
        _layer_of(of_layer, repeat) for period in own for repeat in range(_repeats(period)) for of_layer in period
    )
    return (tuple(of_layers),)


def _is_array(node: Any) -> bool:
    return isinstance(node, NamedArray)


def _repeats(tree: Any) -> int:
    """The size of the axis of layers."""
    return next(leaf for leaf in jax.tree.leaves(tree, is_leaf=_is_array) if _is_array(leaf)).resolve_axis(LAYERS).size


def _layer_of(tree: Any, index: int | slice) -> Any:
    def of(leaf: NamedArray) -> NamedArray:
        axis, names = leaf.axis_names.index(LAYERS), leaf.axis_names
        # Not leaf[LAYERS, index], which makes JAX compile a program for each shape of NumPy's arrays.
        array = leaf.array[(slice(None),) * axis + (index,)]
        return NamedArray(array, names if isinstance(index, slice) else names[:axis] + names[axis + 1 :])

    return jax.tree.map(of, tree, is_leaf=_is_array)


def periods(kinds: Sequence[Hashable]) -> list[tuple[tuple[Hashable, ...], int]]:
    """[(period, number of repeats)], in order.

    Each period is the one whose repeats cover the most layers from there on; if several do, the shortest.
    """
    found, first = [], 0
    while first < len(kinds):
        best = (tuple(kinds[first : first + 1]), 1)
        for size in range(1, min(LONGEST_PERIOD, len(kinds) - first) + 1):
            period = tuple(kinds[first : first + size])
            repeats = 1
            while tuple(kinds[first + size * repeats : first + size * (repeats + 1)]) == period:
                repeats += 1
            if (repeats > 1 or size == 1) and size * repeats > len(best[0]) * best[1]:
                best = period, repeats
        found.append(best)
        first += len(best[0]) * best[1]
    return found


def _policy_around_layers(compute: ComputeConfig) -> ScanCheckpointPolicy:
    """The policy of a scan over longer periods: it keeps the input of each layer too.

    JAX asks this policy, not those of the layers' own checkpoints, what to keep of the first pass through a layer.
    """
    policy = compute.checkpoint_policy
    if compute.gradient_checkpointing not in ("products", "full"):
        return policy
    kept = policy.save_block_internals if isinstance(policy.save_block_internals, list) else []
    return ScanCheckpointPolicy(save_block_internals=[LAYER_INPUT, *kept])
