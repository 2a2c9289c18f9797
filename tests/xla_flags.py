"""XLA flags with which tests compile fast rather than well. They must be set before JAX is imported."""

from importlib.metadata import version

# Compiling takes most of the tests' time. Level 0 halves it, and fusions without MLIR take a third of the rest. They
# compute the same up to rounding. Later versions of XLA compile faster by themselves, and stop at a flag that is gone.
# A program in one piece, not in pieces for more threads, takes a twentieth less.
ONE_DEVICE = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):
    ONE_DEVICE += " --xla_cpu_use_fusion_emitters=false"
TWO_DEVICES = f"{ONE_DEVICE} --xla_force_host_platform_device_count=2"
EIGHT_DEVICES = f"{ONE_DEVICE} --xla_force_host_platform_device_count=8"
