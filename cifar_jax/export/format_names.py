"""Names of the formats, apart from what writes them, so that the command line can list them at once."""

from typing import Literal, TypeAlias

FormatName: TypeAlias = Literal["onnx", "stablehlo", "keras", "pytorch", "hub", "web"]
