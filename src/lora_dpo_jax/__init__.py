"""Direct Preference Optimization with LoRA adapters in JAX, Equinox and Haliax."""

__version__ = "0.1.0"
