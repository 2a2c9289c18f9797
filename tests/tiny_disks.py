"""Disks that fail: no file can grow beyond a size, as where none is left; and files that change by themselves."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax


@contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """Writes beyond that fail with EFBIG, "File too large": it takes the way of ENOSPC, and needs no file system.

    Python ignores SIGXFSZ, which comes with it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    shortest = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # programs that were not kept are warned of
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)


def flip_a_bit(path: Path, at: float = 0.5) -> None:
    """At a share of its length."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)
