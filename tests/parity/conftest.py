"""Reference libraries, imported only when a parity test runs, and a summary of the measured differences."""

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
        reason = "Keras 3, tf_keras and TensorFlow are not all installed; `make parity` installs them"
        tensorflow = pytest.importorskip("tensorflow", reason=reason)
        tensorflow.config.set_visible_devices([], "GPU")
        yield {name: pytest.importorskip(name, reason=reason) for name in ("keras", "tf_keras")}


@pytest.fixture(scope="session")
def keras(libs: dict[str, ModuleType]) -> ModuleType:
    """Keras 3."""
    return libs["keras"]


@pytest.fixture(scope="session")
def written(libs: dict[str, ModuleType], cifar10: Splits, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Builds a reference network and saves it with its Keras; the file of 100 MB is deleted when the context exits."""

    @contextmanager
    def write(case: Case) -> Iterator[tuple[Reference, Path]]:
        lib = libs[case.lib]
        model = build(lib, case)
        # In training mode Keras keeps every activation: 120 MB per image at 224.
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
    """PyTorch and the three libraries built on it, by name."""
    with torch_networks.imported() as libs:
        yield libs


@pytest.fixture(scope="session")
def torch_written(
    torch_libs: SimpleNamespace, cifar10: Splits, tmp_path_factory: pytest.TempPathFactory
) -> TorchWritten:
    """Builds a reference network and saves it with its library; the files are deleted when the context exits."""

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
    """Prints the measured differences, from which the tables in the documents are made."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    measured = [report for report in reports if report.when == "call" and report.user_properties]
    if measured:
        terminalreporter.section("measured")
    for report in measured:
        values = "  ".join(f"{name} {value:.3g}" for name, value in report.user_properties)
        terminalreporter.line(f"{report.nodeid.rpartition('/')[-1]}  {values}")
