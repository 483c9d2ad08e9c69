"""A weights file of which it is known what it is, and where each of its tensors goes: what every reader ends in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cifar_jax.errors import WeightsError
from cifar_jax.files import sha256_of_file
from cifar_jax.models.backbone import Backbone
from cifar_jax.models.preprocess import Preprocessing
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained.merge import Path as VariablePath, merge, top_of
from cifar_jax.pretrained.names import layouts


@dataclass(frozen=True)
class Reading:
    """Nothing of it has been merged yet, so it may still not fit.

    Attributes:
      path: of the file.
      family: of its tensors' names: keras, keras-2016, torchvision, huggingface or ours.
      tensors: by name, prefixes of wrappers taken off, in the file's own order of axes.
      names: for each variable that the network may have the tensor that fills it.
      top: the tensors of the classifier, kernel and bias.
      ignored: tensors that nothing needs, with the reason.
      config: the network.
      preprocessing: what its input goes through.
      image_size: side in pixels of its input.
      variant: how it is run and what decided that, for people.
      layout: the order of the axes in the file.
      refusal: why it must not be used even if it fits; empty where there is no reason.
      notes: a sentence for each thing that the user should know, such as what had to be assumed.
    """

    path: Path
    family: str
    tensors: Mapping[str, np.ndarray]
    names: Mapping[VariablePath, str]
    top: tuple[str, str]
    config: ResNetConfig
    preprocessing: Preprocessing
    image_size: int
    variant: str
    ignored: Mapping[str, str] = field(default_factory=dict)
    layout: layouts.Layout = layouts.KERAS
    refusal: str = ""
    notes: tuple[str, ...] = ()


def backbone_of(reading: Reading) -> Backbone:
    """The backbone that a file holds, by a total merge.

    Raises:
      WeightsError: when its tensors do not fit the network, or there is a reason not to use it.
    """
    path, config = reading.path, reading.config
    top = top_of(reading.tensors, reading.top, config, str(path), transposed=reading.layout is layouts.TORCH)
    known = [*reading.ignored, *reading.top]
    variables = merge(reading.tensors, reading.names, config, known, str(path), reading.layout)
    if reading.refusal:  # only now: tensors that do not fit tell more
        raise WeightsError(reading.refusal)
    return Backbone(
        config,
        reading.preprocessing,
        reading.image_size,
        variables,
        sha256=sha256_of_file(path),
        source=str(path),
        variant=reading.variant,
        top=top,
    )
