"""What the compiled step copies, clears, and moves through memory, read in the program's text, without a device:

    python -m bench.compiled --shapes '[tiny]' --platforms '[cpu, tpu, gpu]'
    python -m bench.compiled --shapes '[1b, 8b]' --platforms '[gpu]'

TPUs need libtpu (`pip install -e '.[tpu]'`), GPUs JAX's CUDA plugin (`pip install -e '.[gpu-plan]'`). Prints a line of
the table as soon as a program is compiled. Exit status 1 if a program copies more of the frozen weights, or clears more
memory, than the bounds allow. Bytes are of one micro-batch; those of the head, of one block of targets.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import equinox as eqx
import jax

from bench import memory, models
from bench.measure import emit
from bench.wiring import FastModel, Lora, Trainer
from lora_dpo_jax.cost.gpus import installed_plugin
from lora_dpo_jax.cost.memory import HANDED_ON, ProgramMemory
from lora_dpo_jax.cost.program_text import Instruction, computations_of, instructions_of, num_bytes_of, runs_of
from lora_dpo_jax.lora import trainable_filter
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.sharding import Placement

TOPOLOGIES = {"tpu": "v5p:1x1x1", "gpu": "h100:1"}  # cpu: this machine
PRODUCTS = {"dot", "convolution"}
PRODUCT_CALLS = ("gemm", "cublas", "matmul", "grouped_")  # in the names of custom calls and of Pallas kernels
MOVES = {"dynamic-slice", "slice", "copy", "transpose", "reshape", "concatenate", "convert"}
PARTS = {"dynamic-slice", "slice", "gather"}
INDICES = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "add", "subtract", "compare", "select"}
COLUMNS = ("weights_copied_mb", "zeros_mb", "elementwise_mb", "head_block_mb", "kernels_mb", "products_a_layer")


@dataclass(frozen=True)
class Options(memory.Options):
    shapes: list[str] = field(default_factory=lambda: ["tiny"])
    platforms: list[str] = field(default_factory=lambda: ["cpu", "tpu", "gpu"])
    model: FastModel = field(default_factory=FastModel)
    lora: Lora = field(default_factory=Lora)
    trainer: Trainer = field(default_factory=Trainer)
    reference: str = "cached"
    tokens: int = 7680  # of a row. A factor of 15 keeps arrays of activations from being as large as those of weights.
    most_copied: float | None = None  # bounds: times the layers' frozen weights that may be copied
    most_cleared: float | None = None  # and times the temporary memory that may be filled with zeros

    def __post_init__(self):
        super().__post_init__()
        if unknown := set(self.platforms) - {"cpu", *TOPOLOGIES}:
            raise ValueError(f"platforms={self.platforms} may be cpu, tpu and gpu, not {sorted(unknown)}")


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # nothing is executed, and the CUDA plugin need not find a GPU
    options = parse(Options)
    if "gpu" in options.platforms and installed_plugin() is None:
        raise SystemExit(f"platforms={options.platforms}: gpu needs JAX's CUDA plugin: pip install -e '.[gpu-plan]'")
    columns = ("layers_mb", *COLUMNS, "temporary_mb")
    print("| shape | platform | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 2) + "|", flush=True)
    rows, broken = [], []
    for shape in options.shapes:
        for platform in options.platforms:
            row = measure(replace(options, shape=shape), platform)
            rows.append(row)
            figures = " | ".join(f"{row[name]:,.1f}" for name in columns)
            print(f"| {shape} | {platform} | {figures} |", flush=True)
            broken += [f"{shape} on {platform}: {text}" for text in beyond(options, row)]
    emit({"tokens": options.tokens, "programs": rows}, options.out)
    if broken:
        sys.exit("\n".join(broken))


def beyond(options: Options, row: dict[str, Any]) -> Iterator[str]:
    """The bounds that a program breaks."""
    copied, cleared = row["weights_copied_mb"], row["zeros_mb"]
    if options.most_copied is not None and copied > options.most_copied * row["layers_mb"]:
        yield f"{copied:.1f} MB of weights copied, of {row['layers_mb']:.1f}: more than most_copied allows"
    if options.most_cleared is not None and cleared > options.most_cleared * row["temporary_mb"]:
        yield f"{cleared:.1f} MB of zeros, of {row['temporary_mb']:.1f} temporary: more than most_cleared allows"


def measure(options: Options, platform: str) -> dict[str, Any]:
    """The figures of one program, in MB of a micro-batch."""
    options = replace(options, row_lengths=[options.tokens], devices=1, topology=TOPOLOGIES.get(platform, "cpu"))
    is_here = platform == "cpu"
    where = Placement(options.trainer.mesh, jax.devices("cpu")[:1]) if is_here else memory.placement(options)
    learner = memory.learner_of(options, where)
    (batch,) = memory.batches(options, where)
    compiled = learner.compile(where.abstract_batch(batch))
    model = learner.state.model
    frozen = eqx.filter(model, trainable_filter(model), inverse=True).model.layers
    stacks = {leaf.size for leaf in jax.tree.leaves(frozen)}
    layers, vocabulary = model.config.num_layers, models.decoder_config(options.shape).vocab_size
    found = Traffic(compiled.as_text(), layers, stacks, vocabulary).found
    return {
        "shape": options.shape,
        "platform": platform,
        **{name: found[name] / (layers if name.endswith("layer") else 1e6) for name in COLUMNS},
        "layers_mb": sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(frozen)) / 1e6,
        "temporary_mb": ProgramMemory.of(compiled).temporary / 1e6,
    }


class Traffic:
    """What the instructions of a program read and write, by what they are for."""

    def __init__(self, program: str, layers: int, stacks: set[int], vocabulary: int):
        """`stacks` are the numbers of elements of the frozen arrays, each of which holds all layers."""
        self.computations, entry = computations_of(program)
        self.layers, self.vocabulary, self.stacks = layers, vocabulary, stacks
        self.found = dict.fromkeys(COLUMNS, 0.0)
        self.inside: dict[str, set[str]] = {}
        for name, times in runs_of(self.computations, entry).items():
            instructions = instructions_of(self.computations.get(name, []))
            for instruction in instructions.values():
                self._count(instruction, instructions, times)

    def _count(self, one: Instruction, others: dict[str, Instruction], times: int) -> None:
        if one.operation in HANDED_ON - {"copy-start"} or one.operation in ("constant", "call", "iota"):
            return
        operations = self._operations(one)
        if one.operation.endswith("-done") or operations == {"custom-call AllocateBuffer"}:
            return
        work = operations - INDICES
        operands = [shape for name in one.operands if name in others for shape in others[name].shapes]
        has_vocabulary = any(self.vocabulary in _dims(shape) for shape in (*operands, *one.shapes))
        traffic = times * self._bytes(one, others)
        if has_vocabulary and "gather" not in work:
            self.found["head_block_mb"] += traffic
        elif operations & PRODUCTS or any(word in operation for operation in operations for word in PRODUCT_CALLS):
            self.found["products_a_layer"] += times
        elif any(operation.startswith("custom-call") for operation in operations):
            self.found["kernels_mb"] += traffic
        elif work <= MOVES and (copied := self._weights_in(one, others)):
            self.found["weights_copied_mb"] += times * copied
        elif operations <= {"broadcast", "constant", "bitcast", "parameter", "tuple"} or self._copies_zeros(
            one, others
        ):
            self.found["zeros_mb"] += times * _num_bytes(one.shapes)
        else:
            self.found["elementwise_mb"] += traffic

    def _operations(self, one: Instruction) -> set[str]:
        """Those inside of a fusion, or its own. A custom call has the names of its target and of its kernel, if any."""
        if one.operation == "custom-call":
            target = one.attributes.partition('custom_call_target="')[2].partition('"')[0]
            kernel = one.attributes.partition(', name = "')[2].partition('"')[0]
            return {f"custom-call {target} {kernel}".rstrip()}
        if not one.operation.startswith(("fusion", "async", "call")) or not one.called:
            return {one.operation}
        if one.called not in self.inside:
            self.inside[one.called] = set()
            inner = instructions_of(self.computations.get(one.called, [])).values()
            self.inside[one.called] = set().union(*(self._operations(each) for each in inner))
        return self.inside[one.called]

    def _weights_in(self, one: Instruction, others: dict[str, Instruction]) -> int:
        """The bytes that it slices out of stacks of frozen weights, or moves after that."""
        scope = instructions_of(self.computations.get(one.called, [])) if one.called else others
        slices = [each for each in (scope.values() if one.called else [one]) if each.operation == "dynamic-slice"]
        stacks = [each for each in slices if _size(scope[each.operands[0]].shapes) in self.stacks]
        sliced = sum(_num_bytes(each.shapes) for each in stacks if self.layers * _size(each.shapes) in self.stacks)
        moved = [others[name] for name in one.operands if name in others] if not slices else []
        return sliced + sum(
            self._weights_in(each, others) for each in moved if self._operations(each) <= MOVES | INDICES
        )

    def _copies_zeros(self, one: Instruction, others: dict[str, Instruction]) -> bool:
        source = others.get(one.operands[0]) if one.operands else None
        while source and source.operation in ("bitcast", "get-tuple-element") and source.operands:
            source = others.get(source.operands[0])
        is_zeros = source is not None and self._operations(source) <= {"broadcast", "constant", "bitcast", "parameter"}
        return one.operation in ("copy", "copy-start") and is_zeros and source.operation != "parameter"

    def _bytes(self, one: Instruction, others: dict[str, Instruction]) -> int:
        """Read and written; of an array that is only sliced or updated in part, that part."""
        inner = instructions_of(self.computations.get(one.called, [])) if one.called else {}
        if not inner:
            operands = sum(_num_bytes(others[name].shapes) for name in one.operands if name in others)
            if one.operation == "dynamic-slice":
                return 2 * _num_bytes(one.shapes)
            if one.operation == "dynamic-update-slice":
                return 2 * _num_bytes(others[one.operands[1]].shapes)
            return operands + _num_bytes(one.shapes)
        updates = [each for each in inner.values() if each.operation == "dynamic-update-slice"]
        read = sum(self._read_of(each, inner) for each in inner.values() if each.operation == "parameter")
        written = sum(_num_bytes(inner[update.operands[1]].shapes) for update in updates)
        result = [*inner.values()][-1]  # the instruction's own shapes list its operands too, if it is a start operation
        if result.operation == "tuple":
            return read + (written or sum(_num_bytes(inner[name].shapes) for name in result.operands))
        return read + (written or _num_bytes(result.shapes))

    def _read_of(self, source: Instruction, inner: dict[str, Instruction]) -> int:
        """The bytes of an array inside of a fusion that are read: of one that is only sliced, these parts."""
        read = 0
        for user in (each for each in inner.values() if source.name in each.operands):
            if user.operation == "bitcast":
                read += self._read_of(user, inner)
            elif user.operation in PARTS and user.operands[0] == source.name:
                read += _num_bytes(user.shapes)
            elif user.operation != "dynamic-update-slice" or user.operands[0] != source.name:
                return _num_bytes(source.shapes)
        return min(read, _num_bytes(source.shapes))


def _dims(shape: str) -> list[int]:
    return [int(dim) for dim in shape.partition("[")[2].rstrip("]").split(",") if dim]


def _size(shapes: tuple[str, ...]) -> int:
    """Elements of the first array, which is the result where a start operation lists its operands too."""
    size = 1
    for dim in _dims(shapes[0]) if shapes else []:
        size *= dim
    return size


def _num_bytes(shapes: tuple[str, ...]) -> int:
    return sum(num_bytes_of(shape) for shape in shapes)


if __name__ == "__main__":
    main()
