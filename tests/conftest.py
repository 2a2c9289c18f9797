"""Tests run on eight CPU devices, compiled fast rather than well. All of it must be said before JAX is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the tests' time; level 0 halves it and computes the same.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
