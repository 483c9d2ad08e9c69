"""What the sections share: rows of a table, how much is measured, and the files and processes it takes."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.networks import IMAGE_SIZE, Networks, write_networks
from benchmarks.ours import load_images
from benchmarks.processes import Usage, run_command
from benchmarks.worker import Worker

TRAIN, TEST = 50_000, 10_000
ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
# Two libraries live side by side on the GPU, so neither may take all of its memory beforehand.
ON_GPU = {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Row(NamedTuple):
    """A line of a table.

    Attributes:
      name: what was measured.
      values: in the section's unit, one a round; none where it could not be measured, which the note explains.
      ours: the row of this project that it is compared with, round by round.
      note: what one should know.
      difference: max|a-b| / max|b| of its features and ours, taken before anything was timed.
    """

    name: str
    values: list[float]
    ours: str | None = None
    note: str = ""
    difference: float | None = None


class Section(NamedTuple):
    """A table. Its unit is `images/s`, of which more is better, or one of which less is: `s`, `GB`."""

    title: str
    about: str
    unit: str
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """Its fields and those of its rows."""
        return self._asdict() | {"rows": [row._asdict() for row in self.rows]}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int = 5
    image_size: int = IMAGE_SIZE
    images: int = 32  # through the backbone in a round
    notebook: tuple[int, int] = (320, 64)  # training and validation images in a round; five to one, as in the whole job
    job: tuple[int, int] = (TRAIN, TEST)  # images whose features are cached
    job_size: int = 32  # pixels a side at which they are extracted, so that it takes a minute
    head: int = TRAIN
    in_features: int = 2048
    heads: tuple[int, int] = (16, 5000)  # and the examples of each
    few: int = 10_000  # the smaller job whose memory is measured
    at_full_size: int = 480  # images of one at the full image size
    gpu_images: int = 8192
    peers: bool = True


QUICK = Sizes(1, 32, 8, (20, 4), (80, 20), 32, 200, 32, (3, 100), 96, 96, 0, peers=False)


@dataclass
class Bench:
    """A directory for files, and in it networks, images and the first runs of whole jobs, made when asked for."""

    directory: Path
    dataset: str = "cifar10"
    sizes: Sizes = field(default_factory=Sizes)
    first_runs: dict[str, Usage] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Of every process: what libraries keep for later goes into the directory."""
        kept = {"KERAS_HOME": "keras", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CIFAR_JAX_CACHE": "cache"}
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_BACKEND": "tensorflow"}
        return {name: str(self.directory / where) for name, where in kept.items()} | quiet

    def worker(self, make: Callable[..., Any], *arguments: Any, on: Mapping[str, str] = ON_CPU) -> Worker:
        """A function in a process of its own."""
        return Worker(make, *arguments, environment={**self.environment, **on})

    def elsewhere(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of one call in a process that ends with it, so that this one stays small."""
        with self.worker(partial, function, *arguments) as worker:
            return worker()

    @cached_property
    def images(self) -> tuple[np.ndarray, ...]:
        """Training images and labels, validation images and labels."""
        return self.elsewhere(load_images, self.dataset, *self.sizes.notebook)

    @cached_property
    def networks(self) -> Networks:
        """The files that all load."""
        return self.elsewhere(write_networks, self.directory, self.images[0][:32], not self.sizes.peers)

    def job(self, weights: Path | str, image_size: int, num_train: int, num_test: int, cache: str) -> Usage:
        """Runs the whole job as one types it.

        Args:
          weights: a file or a name.
          image_size: pixels a side.
          num_train: training images.
          num_test: test images.
          cache: the name of its cache; from one that an earlier run used, the features come.
        """
        out = self.directory / "run"
        options = {"--weights": weights, "--dataset": self.dataset, "--image-size": image_size, "--out": out}
        if (num_train, num_test) != (TRAIN, TEST):  # all is the default, and drawing a subset is work of its own
            options |= {"--train-examples": num_train, "--test-examples": num_test}
        options |= {"--cache-dir": self.directory / cache}
        words = [str(word) for option in options.items() for word in option]
        shutil.rmtree(out, ignore_errors=True)
        arguments = ["-m", "cifar_jax", "train", "--no-progress", *words]
        return run_command(arguments, self.environment | ON_CPU, self.directory / "train.log")

    def full_job(self, weights: Path | str) -> Usage:
        """The job of all images with a cache of its own for each network; the first run makes their features."""
        return self.job(weights, self.sizes.job_size, *self.sizes.job, f"cache-{Path(weights).stem}")

    def first_run(self, weights: Path | str) -> Usage:
        """What the first `full_job` took."""
        if str(weights) not in self.first_runs:
            self.first_runs[str(weights)] = self.full_job(weights)
        return self.first_runs[str(weights)]
