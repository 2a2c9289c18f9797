"""Tests run on eight CPU devices, compiled fast rather than well. All of it must be said before JAX is imported.

`--without-torch` chooses the tests that need none, for an environment that lacks it.
"""

import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch_users import FIXTURES, needs_torch
from xla_flags import EIGHT_DEVICES, TWO_DEVICES

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{EIGHT_DEVICES} {os.environ.get('XLA_FLAGS', '')}"
# One cache of compiled programs for all tests and the processes that they start, gone when the session ends. Workers of
# xdist inherit it from the process that starts them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    PROGRAMS = tempfile.TemporaryDirectory(prefix="programs_of_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


MOST_MEMORY = 2 * 2**30  # bytes of a worker, above which compiled programs are let go after a file


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-torch", action="store_true", help="run only the tests that need no torch")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.option.without_torch and collection_path.match("test_*.py") and needs_torch(collection_path):
        return True
    return None  # as pytest would


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.without_torch:
        left_out = [item for item in items if FIXTURES & set(getattr(item, "fixturenames", ()))]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported stays, and much of what tracing makes: the garbage collector need not look through it so often.

    From here on, processes that are started find no torch. Workers of xdist, which need it, have been started.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    paths = [str(Path(__file__).with_name("without_torch")), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


@pytest.fixture(scope="module", autouse=True)
def little_memory() -> Iterator[None]:
    """Programs of earlier files fill a worker's memory otherwise; one that is needed again is read from the cache."""
    yield
    statm = Path("/proc/self/statm")  # of Linux
    resident = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
    if resident > MOST_MEMORY and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what was freed otherwise
            libc.malloc_trim(0)


@pytest.fixture(scope="module")
def two_devices() -> Iterator[None]:
    """Runs on all devices, of this process and of those it starts, are on two: split too, and for less time.

    For files that are not about devices. A mesh whose axes are given has the devices that it names.
    """
    import jax

    from lora_dpo_jax.sharding import MeshConfig

    mesh, two = MeshConfig.mesh, jax.devices()[:2]  # this process has eight from here on

    def of_two(self: MeshConfig, devices: list | None = None) -> jax.sharding.Mesh:
        on_all = devices is None and self.axes == MeshConfig().axes
        return mesh(self, two if on_all else devices)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MeshConfig, "mesh", of_two)
        patched.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace(EIGHT_DEVICES, TWO_DEVICES))
        yield


@pytest.fixture
def own_choices(monkeypatch):
    """What a test registers as a type of loss or tracker is gone after it."""
    from lora_dpo_jax.losses import Loss
    from lora_dpo_jax.settings.schema import settings_of
    from lora_dpo_jax.tracking import TrackerConfig

    for choice in (Loss, TrackerConfig):  # subclasses register with their base
        monkeypatch.setattr(choice, "_choice_registry", dict(choice.get_known_choices()))
    yield
    settings_of.cache_clear()
