"""Where compiled programs are kept for the next run."""

from pathlib import Path

import jax


def keep_compiled_programs(chosen: str | None, folder: Path) -> None:
    """Makes JAX keep compiled programs for the next run.

    They go to `chosen` (trainer.jax_compilation_cache_dir), else to JAX's own setting, else below `folder`.
    """
    if chosen is None and not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        chosen = str(folder / "programs")
    if chosen is not None:
        jax.config.update("jax_compilation_cache_dir", chosen)
