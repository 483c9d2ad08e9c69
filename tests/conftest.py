"""Fixtures of all tests: strict dtype promotion, a temporary home and cache, and no skips where CI forbids them."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import forwarding_logs, keep_compiled_in, narrow_networks, without_pictures

from cifar_jax.data import Dataset, Splits
from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.data.sources.tfds import find_prepared

jax.config.update("jax_numpy_dtype_promotion", "strict")

REQUIRED = [
    name
    for name in ("CIFAR_JAX_REQUIRE_DATA", "CIFAR_JAX_REQUIRE_PARITY", "CIFAR_JAX_REQUIRE_BROWSER")
    if os.environ.get(name)
]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Turns skips into failures where CI declares that everything the tests need is installed."""
    report = yield
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which {' and '.join(REQUIRED)} forbids: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache of decoded data sets, shared by the tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps tests away from the user's files, such as the Keras cache and ~/.cache."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("CIFAR_JAX_CACHE", str(home / "cache"))
    for name in ("KERAS_HOME", "TORCH_HOME", "XDG_CACHE_HOME", "CIFAR_JAX_WEIGHTS", "CIFAR_JAX_MIRROR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Makes Ctrl-C work in tests and the processes they start, even if the shell started pytest with it ignored."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Compilation cache shared by the tests of a session, many of which compile the same narrow networks."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(autouse=True)
def compile_cache(request: pytest.FixtureRequest, compiled: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes commands in this process share one compilation cache, except in tests that use `own_compile_cache`."""
    own = "own_compile_cache" in request.fixturenames
    if not own:
        monkeypatch.setattr("cifar_jax.runtime.compile_cache.use_compile_cache", lambda *_, **__: None)
    keep_compiled_in(None if own else compiled)
    yield
    keep_compiled_in(None)


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """Compiles without most optimisations, which takes a third of the time for the step of a network."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def log_messages() -> Iterator[list[str]]:
    """The messages that the library logs during the test."""
    messages: list[str] = []
    with forwarding_logs(messages.append):
        yield messages


@pytest.fixture
def own_compile_cache() -> None:
    """Makes commands use the compilation cache of their own cache directory, as outside tests."""


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces networks by narrow ones and skips figures, so that jobs take seconds."""
    narrow_networks(monkeypatch)
    without_pictures(monkeypatch)


@pytest.fixture(scope="session")
def shapes() -> Dataset:
    """Two hundred synthetic images, twenty of each class."""
    return Dataset(*draw_shapes(200, seed=0))


@pytest.fixture(scope="session")
def cifar10(session_cache: Path) -> Splits:
    """The real CIFAR-10; skips the test where it is not prepared."""
    from cifar_jax.data import load_splits

    if find_prepared("cifar10", None) is None:
        pytest.skip("CIFAR-10 is not prepared; set TFDS_DATA_DIR to the directory of `tfds build cifar10`")
    return load_splits("cifar10", cache_dir=str(session_cache))


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Returns max|a - b| / max|b| over whole tensors."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / np.abs(b).max())
