"""The other libraries, imported only when a test of parity runs, and a summary of what was measured."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from cifar_jax.data import Splits
from parity import torch_networks
from parity.networks import WRITERS, Case, Reference, Written, build, make_reference
from parity.torch_networks import TorchCase, TorchReference, TorchWritten


@pytest.fixture(scope="session")
def libs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ModuleType]]:
    """Keras 3 and Keras 2 by name, both on TensorFlow on the CPU, with a home of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "tensorflow")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        patch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
        reason = "Keras 3, tf_keras and TensorFlow are not all installed: run `make parity`, which sees to that"
        tensorflow = pytest.importorskip("tensorflow", reason=reason)
        tensorflow.config.set_visible_devices([], "GPU")
        yield {name: pytest.importorskip(name, reason=reason) for name in ("keras", "tf_keras")}


@pytest.fixture(scope="session")
def keras(libs: dict[str, ModuleType]) -> ModuleType:
    """Keras 3."""
    return libs["keras"]


@pytest.fixture(scope="session")
def written(libs: dict[str, ModuleType], cifar10: Splits, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Makes a reference network and has its Keras write it; the file, of 100 MB, goes when the context ends."""

    @contextmanager
    def write(case: Case) -> Iterator[tuple[Reference, Path]]:
        lib = libs[case.lib]
        model = build(lib, case)
        # In training mode Keras keeps every activation: 120 MB an image at 224.
        images = cifar10.train.images[: 8 if case.image_size > 96 else 32]
        reference = make_reference(lib, model, case.image_size, case.seed, images, case.top)
        path = tmp_path_factory.mktemp("weights") / "weights.h5"
        WRITERS[case.writer](model, path)
        try:
            yield reference, path
        finally:
            path.unlink()
            lib.backend.clear_session()

    return write


@pytest.fixture(scope="session")
def torch_libs() -> Iterator[SimpleNamespace]:
    """PyTorch and the three libraries on it, by name."""
    with torch_networks.imported() as libs:
        yield libs


@pytest.fixture(scope="session")
def torch_written(
    torch_libs: SimpleNamespace, cifar10: Splits, tmp_path_factory: pytest.TempPathFactory
) -> TorchWritten:
    """Makes a reference network and has its library write it; the files go when the context ends."""

    @contextmanager
    def write(case: TorchCase) -> Iterator[tuple[TorchReference, Path]]:
        images = cifar10.train.images[: 8 if case.image_size > 96 else 32]
        reference = torch_networks.make_reference(torch_libs, case, images)
        directory = tmp_path_factory.mktemp("weights")
        try:
            yield reference, torch_networks.WRITERS[case.writer](reference, directory)
        finally:
            shutil.rmtree(directory)

    return write


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what was measured, so that a table of it can be made again."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    measured = [report for report in reports if report.when == "call" and report.user_properties]
    if measured:
        terminalreporter.section("measured")
    for report in measured:
        values = "  ".join(f"{name} {value:.3g}" for name, value in report.user_properties)
        terminalreporter.line(f"{report.nodeid.rpartition('/')[-1]}  {values}")
