"""Where the time of extraction goes on a CPU, block by block: `python -m benchmarks.stages`.

Beside each block stands what its operations take at the rate that large matrix products reach on the same machine.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.blank import blank_backbone
from cifar_jax.features.extractor import extraction_batch_size
from cifar_jax.models import folded as inference
from cifar_jax.models.resnet import ResNetConfig, block_name
from cifar_jax.runtime.devices import keep_freed_memory, use_all_cores
from cifar_jax.runtime.sharding import make_mesh, replicate, shard

ROUNDS, IMAGE_SIZE = 9, 224
LARGE = 2048


class Part(NamedTuple):
    """Blocks of one shape.

    Attributes:
      name: for people.
      times: how many there are.
      run: `(layers, x) -> x` of one of them.
      layers: of that one.
      shape: of the activation of an image that goes in.
      products: [rows, depth, columns] of each matrix product that it amounts to, for one image.
    """

    name: str
    times: int
    run: Callable[[Any, Any], Any]
    layers: Any
    shape: tuple[int, int, int]
    products: list[tuple[int, int, int]]


def parts_of(prepared: inference.Prepared) -> Iterator[Part]:
    """The network from its stem to its last block, blocks that are alike taken together."""
    config, layers = prepared.config, prepared.layers
    side = prepared.image_size // 2
    width = config.width

    def stem(layer: Any, x: Any) -> Any:
        return inference._relu(inference._conv(x, layer, 2), x.dtype)

    def pool(_: Any, x: Any) -> Any:
        return inference._max_pool(x, config.pool_padding, "cpu")

    image = (prepared.image_size, prepared.image_size, 3)
    yield Part("stem", 1, stem, layers["stem"], image, [(side**2, 147, width)])
    yield Part("max pool", 1, pool, (), (side, side, width), [])
    side, channels = side // 2, width
    alike: dict[Any, list[Part]] = {}
    for (stage, block), stride in inference.block_strides(config).items():
        narrow, wide, out = width * 2**stage, width * 2 ** (stage + 2), side // stride
        products = [(side**2, channels, narrow), (out**2, 9 * narrow, narrow), (out**2, narrow, wide)]
        if block == 0:
            products.append((out**2, channels, wide))

        def run(layers: Any, x: Any, stride: int = stride) -> Any:
            return inference._block(x, layers, stride, "cpu")

        name = f"stage {stage + 1} block {block + 1}"
        part = Part(name, 1, run, layers[block_name(stage, block)], (side, side, channels), products)
        alike.setdefault((stage, stride, channels), []).append(part)
        side, channels = out, wide
    for group in alike.values():
        yield group[0]._replace(times=len(group))


def milliseconds(run: Callable[[], Any], images: int) -> float:
    """Of an image: the median of a few rounds, after two that do not count."""
    taken = []
    for _ in range(ROUNDS + 2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return 1e3 * float(np.median(taken[2:])) / images


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages", description=__doc__)
    parser.add_argument("--network", choices=("torchvision", "keras"), default="torchvision")
    use_all_cores()
    keep_freed_memory()
    strides = parser.parse_args().network == "keras"
    prepared = inference.prepare(blank_backbone(ResNetConfig(stride_in_1x1=strides), IMAGE_SIZE), IMAGE_SIZE)
    mesh, key = make_mesh(len(jax.devices())), np.random.default_rng(0)
    images = extraction_batch_size(IMAGE_SIZE, "cpu") * mesh.size

    def drawn(*shape: int) -> Any:
        return shard(mesh, key.standard_normal((images, *shape), np.float32))

    square = drawn(LARGE // images, LARGE).reshape(-1, LARGE), replicate(mesh, np.zeros((LARGE, LARGE), np.float32))
    product = jax.jit(lambda a, b: jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST))
    peak = 2e-9 * LARGE**3 / (1e-3 * milliseconds(lambda: product(*square), 1))  # GFLOP/s

    print("| part | times | ms an image | at the rate of large products | GFLOP |\n|---|---|---|---|---|")
    total = np.zeros(2)
    for part in parts_of(prepared):
        layers, x, run = replicate(mesh, part.layers), drawn(*part.shape), jax.jit(part.run)
        measured = milliseconds(lambda run=run, layers=layers, x=x: run(layers, x), images)
        flop = 2e-9 * sum(map(math.prod, part.products))
        total += part.times * np.array([measured, flop])
        print(f"| {part.name} | {part.times} | {measured:.2f} | {1e3 * flop / peak:.2f} | {flop:.2f} |", flush=True)
    bound = 1e3 * total[1] / peak
    print(f"| all | | {total[0]:.1f} | {bound:.1f} | {total[1]:.2f} |")
    print(f"\n{1e3 / total[0]:.1f} images/s; at the {peak:.0f} GFLOP/s of large products {1e3 / bound:.1f}.")


if __name__ == "__main__":
    main()
