"""Interface of trained classifiers: a loaded run, and a model that was exported from one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float32

from cifar_jax.config import TrainConfig
from cifar_jax.data.load import Kind
from cifar_jax.data.pictures import Images
from cifar_jax.data.resize import Resize


class Classifier(Protocol):
    """What predicts pictures: `Run` and `export.exported.ExportedModel`."""

    @property
    def path(self) -> Path:
        """Where it is, for messages."""
        ...

    @property
    def config(self) -> TrainConfig:
        """The configuration of the run; of an exported model only what says which images were whose."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names by label."""
        ...

    @property
    def resize(self) -> Resize:
        """How a picture becomes the input."""
        ...

    @property
    def image_size(self) -> int:
        """Side in pixels of the network's input."""
        ...

    @property
    def data_kind(self) -> Kind:
        """What the data set of the run was."""
        ...

    @property
    def loss(self) -> str:
        """The loss that the run was trained and scored with."""
        ...

    @property
    def test_sha256(self) -> str:
        """Digest of the test images of the run."""
        ...

    def probabilities(
        self, images: Images, batch_size: int | None = None
    ) -> Iterator[tuple[slice, Float32[np.ndarray, "rows classes"]]]:
        """Yields rows and their class probabilities, in order.

        Args:
          images: uint8 [n, side, side, 3].
          batch_size: images at a time; chosen if None.
        """
        ...

    def direct_resize(self) -> Resize:
        """How a picture becomes the network's input without being reduced to small training images first.

        Raises:
          UserError: if it is not reduced.
        """
        ...
