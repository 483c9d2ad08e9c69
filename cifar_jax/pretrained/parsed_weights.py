"""A parsed weights file, the common result of all readers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cifar_jax.errors import WeightsError
from cifar_jax.files import sha256_of_file
from cifar_jax.models.backbone import Backbone
from cifar_jax.models.preprocess import Preprocessing
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained import axis_order
from cifar_jax.pretrained.merge import Path as VariablePath, merge, read_classifier


@dataclass(frozen=True)
class ParsedWeights:
    """A parsed weights file whose tensors are not merged yet, so they may still not fit the network.

    Attributes:
      path: path of the file.
      family: family of its tensor names: keras, keras-2016, torchvision, huggingface or ours.
      tensors: tensors by name, without wrapper prefixes, in the file's axis order.
      names: tensor name by path, for every variable that the network may have.
      top: tensor names of the classifier's kernel and bias.
      ignored: names of tensors that are not needed, with the reason.
      config: the network.
      preprocessing: the preprocessing of its input.
      image_size: side of its input in pixels.
      variant: display name of the variant and what decided it.
      layout: the axis order in the file.
      refusal: error message if the weights must not be used even if they fit; empty otherwise.
      notes: messages for the user, such as assumptions that were made.
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
    layout: axis_order.Layout = axis_order.KERAS
    refusal: str = ""
    notes: tuple[str, ...] = ()


def backbone_of(parsed: ParsedWeights) -> Backbone:
    """Builds the backbone of a parsed file by a strict merge.

    Raises:
      WeightsError: if the tensors do not fit the network, or the file must not be used.
    """
    path, config = parsed.path, parsed.config
    top = read_classifier(parsed.tensors, parsed.top, config, str(path), transposed=parsed.layout is axis_order.TORCH)
    known = [*parsed.ignored, *parsed.top]
    variables = merge(parsed.tensors, parsed.names, config, known, str(path), parsed.layout)
    if parsed.refusal:  # raised last, because a mismatch of the tensors tells the user more
        raise WeightsError(parsed.refusal)
    return Backbone(
        config,
        parsed.preprocessing,
        parsed.image_size,
        variables,
        sha256=sha256_of_file(path),
        source=str(path),
        variant=parsed.variant,
        top=top,
    )
