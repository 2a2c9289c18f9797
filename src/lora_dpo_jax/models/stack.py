"""The layers of a decoder, in order, and how they are held: those that are alike share arrays and one program.

    layers: full, full, ...          layers: window x 5, full; again; and two more with a window

    segments                         segments
      0: Stacked {layers: 32}          0: Stacked {layers: 2}     one body for the whole period
         layers                           layers
           0                                0 ... 5
                                       1: Stacked {layers: 2}     what is left
                                          layers
                                            0

Names of the checkpoint follow from here: layer 7 is slice 1 of layer 1 of segment 0 on the right.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
from haliax import Axis

from lora_dpo_jax.axes import LAYERS
from lora_dpo_jax.lora import TokenKey
from lora_dpo_jax.models.compute import CHECKPOINT_POLICIES, ComputeConfig

LONGEST_PERIOD = 16  # layers


class Period(eqx.Module):
    """Layers that differ from each other, one after the other."""

    layers: tuple[Any, ...]


class LayerStack(eqx.Module):
    """Scanned by its repeating periods."""

    segments: tuple[hnn.Stacked[Period], ...]
    compute: ComputeConfig = eqx.field(static=True)

    @staticmethod
    def init(make_layer: Callable, kinds: Sequence[Hashable], compute: ComputeConfig, *, key) -> "LayerStack":
        """A layer `make_layer(kind, key=...)` for each of `kinds`, which says in what layers differ."""
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
        """carry, output = body(layer, carry, shared, key of the layer, its own) for one layer after the other.

        `own`: for each segment, for each layer of its period, arrays with the axis of the segment before. The outputs
        come so too.
        """
        per_layer = self._per_layer(body)

        def of_period(period: Period, carry, shared, keys, own):
            outputs = []
            for i, layer in enumerate(period.layers):
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
            stacked: Any = segment  # haliax's types leave out the further arguments of a scanned function
            carry, output = stacked.scan_via(of_period)(carry, shared, here, of_segment)
            outputs.append(output)
        return carry, outputs

    @property
    def num_layers(self) -> int:
        return sum(segment.Block.size * len(segment.stacked.layers) for segment in self.segments)

    def of_layers(self, fn: Callable[[Axis, Any], Any]) -> tuple[tuple[Any, ...], ...]:
        """fn(axis of the segment, layer of its period) of each, as `scan` takes `own`."""
        return tuple(tuple(fn(s.Block, layer) for layer in s.stacked.layers) for s in self.segments)

    def numbers(self, path: Sequence[Any]) -> tuple[range, int]:
        """For `parameters.checkpoint_names`: the numbers of the layers that an array below has a slice for.

        `path` is that of the array below this stack; also returned is how much of it leads to the layer.
        """
        _, segment, _, _, position, *_ = path  # segments, [s], stacked, layers, [i]
        before = self.segments[: segment.idx]
        first = sum(s.Block.size * len(s.stacked.layers) for s in before) + position.idx
        here = self.segments[segment.idx]
        size = len(here.stacked.layers)
        return range(first, first + size * here.Block.size, size), 5

    def _per_layer(self, body: Callable) -> tuple[Callable, Callable]:
        """`body` for a period of one layer, which the scan checkpoints, and for longer ones."""
        if self.compute.gradient_checkpointing == "none":
            return body, body
        policy = CHECKPOINT_POLICIES["products" if self.compute.gradient_checkpointing == "products" else "full"]
        return body, policy.checkpoint("layer_carry", "layer_input", body)


def periods(kinds: Sequence[Hashable]) -> list[tuple[tuple[Hashable, ...], int]]:
    """[(period, how often it comes)], in order: at each place the period that goes furthest, the shortest of these."""
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


def _policy_around_layers(compute: ComputeConfig) -> Any:
    """For the scan over periods of layers that are checkpointed one by one: their inputs are what is kept."""
    return CHECKPOINT_POLICIES["nested" if compute.gradient_checkpointing == "nested" else "none"]
