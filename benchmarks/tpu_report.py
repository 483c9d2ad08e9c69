"""What the TPU compiler says of the three costly programs, where no TPU is at hand: `make tpu-report`.

libtpu compiles for a topology that is not there. Memory, operations and bytes are the compiler's estimate for a chip
and a call, and the images a second are the bound that a v5e's peak rates put on them; nothing here is a measurement.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import os
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

# Set before JAX is imported: its own devices stay the CPU's, and libtpu need not ask where it is.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.blank import blank_backbone
from benchmarks.hlo import collectives
from cifar_jax.config import TrainConfig
from cifar_jax.files import write_json
from cifar_jax.models.backbone import extract
from cifar_jax.models.folded import features_of, prepare
from cifar_jax.models.head import dense_logits, init_head
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.runtime.machine_info import package_versions
from cifar_jax.runtime.sharding import mesh_of, rows_sharding
from cifar_jax.train.finetune import make_network, trainable
from cifar_jax.train.losses import cross_entropy
from cifar_jax.train.step import init_state, make_train_step
from cifar_jax.train.task import Batch, Task, finetune_task, live_task

TOPOLOGIES = ("v5e:2x2", "v5e:16x16")
# https://cloud.google.com/tpu/docs/v5e: bfloat16 operations and bytes a second, and bytes of memory, of a chip.
PEAK_FLOPS, PEAK_BYTES, MEMORY = 197e12, 819e9, 16 * 2**30
IMAGE_SIZE, PRECISION = 224, "bfloat16"
NETWORK = ResNetConfig()
TX = optax.sgd(0.01, momentum=0.9)
RESULTS = Path(__file__).parent / "results" / "tpu.json"


def shapes_on(mesh: Mesh, tree: Any, rows: bool = False) -> Any:
    """Arrays or shapes as shapes that lie on the mesh, whole on each chip or with their rows divided."""
    sharding = rows_sharding(mesh) if rows else NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def batch(size: int) -> Batch:
    """Images as they come from the data set."""
    return jax.eval_shape(
        lambda: Batch(jnp.zeros((size, 32, 32, 3), jnp.uint8), jnp.zeros(size, jnp.int32), jnp.zeros(size))
    )


def extraction(mesh: Mesh, per_chip: int) -> Any:
    """Features of images, as `make_extractor` has them compiled."""
    images = shapes_on(mesh, batch(per_chip * mesh.size).inputs, rows=True)
    return jax.jit(features_of).lower(
        shapes_on(mesh, prepare(blank_backbone(NETWORK, IMAGE_SIZE), None, PRECISION, "tpu")), images
    )


def live_step(mesh: Mesh, per_chip: int) -> Any:
    """A step of the head through the frozen backbone."""
    backbone, head = blank_backbone(NETWORK, IMAGE_SIZE), jax.eval_shape(_head)
    function = partial(extract, image_size=IMAGE_SIZE, precision=PRECISION)
    return _lowered(live_task(head, dense_logits, backbone, function, {}), mesh, per_chip)


def finetune_step(mesh: Mesh, per_chip: int) -> Any:
    """A step of all layers, BatchNorm over the batch of all chips."""
    network = make_network(TrainConfig(mode="finetune", precision=PRECISION), NETWORK, platform="tpu")
    backbone, head = blank_backbone(NETWORK, IMAGE_SIZE), jax.eval_shape(_head)
    function = trainable(network, backbone, IMAGE_SIZE, mesh=mesh)
    return _lowered(finetune_task(head, dense_logits, backbone.variables, function, {}), mesh, per_chip)


def _head() -> Any:
    return init_head(jax.random.key(0), NETWORK.features)


def _lowered(task: Task, mesh: Mesh, per_chip: int) -> Any:
    step = jax.jit(make_train_step(task.forward, cross_entropy, TX), donate_argnums=0)
    state = jax.eval_shape(lambda params, stats: init_state(params, TX, stats), task.params, task.batch_stats)
    examples = shapes_on(mesh, batch(per_chip * mesh.size), rows=True)
    return step.lower(shapes_on(mesh, state), shapes_on(mesh, task.frozen), examples, jax.random.key(0))


# Images a chip and call: as many as the extractor takes by default, and in training of all layers what memory holds.
PROGRAMS = {"extraction": (extraction, 256), "live step": (live_step, 256), "finetune step": (finetune_step, 64)}


def report(topology: str, program: str) -> dict[str, Any]:
    """Compiles a program for a topology. Returns its row of the table."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = mesh_of(devices)
    lower, per_chip = PROGRAMS[program]
    start = time.perf_counter()
    compiled = lower(mesh, per_chip).compile()
    seconds = time.perf_counter() - start
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    exchanged = collectives(compiled.as_text())
    computing, moving = cost["flops"] / PEAK_FLOPS, cost["bytes accessed"] / PEAK_BYTES
    bound = per_chip / max(computing, moving)
    return {
        "topology": topology,
        "chips": mesh.size,
        "program": program,
        "images_a_chip": per_chip,
        "memory_gib_a_chip": (used + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes) / 2**30,
        "gflop_an_image": cost["flops"] / per_chip / 1e9,
        "mb_an_image": cost["bytes accessed"] / per_chip / 1e6,
        "collectives": dict(Counter(one.name for one in exchanged)),
        "collective_mb": sum(one.bytes for one in exchanged) / 1e6,
        "bound_by": "memory" if moving > computing else "arithmetic",
        "bound_images_a_second_a_chip": bound,
        "bound_images_a_second": bound * mesh.size,
        "compile_seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| topology | program | images a chip | memory a chip | GFLOP/image | MB/image | collectives | at most a chip "
        "| in all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        exchanged = ", ".join(f"{count} {name}" for name, count in row["collectives"].items())
        cells = (
            f"{row['topology']} ({row['chips']} chips)",
            row["program"],
            str(row["images_a_chip"]),
            f"{row['memory_gib_a_chip']:.1f} of {MEMORY // 2**30} GiB",
            f"{row['gflop_an_image']:.2f}",
            f"{row['mb_an_image']:.1f}",
            f"{exchanged}; {row['collective_mb']:.1f} MB" if exchanged else "none",
            f"{row['bound_images_a_second_a_chip']:,.0f} img/s ({row['bound_by']})",
            f"{row['bound_images_a_second']:,.0f} img/s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Compiles, keeps the rows and prints them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    about = {
        "what": "the TPU compiler's estimate for a chip and a call, and the bound of its peak rates; not a measurement",
        "network": f"ResNet50 at {IMAGE_SIZE}x{IMAGE_SIZE}, {PRECISION}",
        "peaks": {"flops_a_second": PEAK_FLOPS, "bytes_a_second": PEAK_BYTES, "memory_bytes": MEMORY},
        "packages": package_versions() | {"libtpu": importlib.metadata.version("libtpu")},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for topology, program in itertools.product(options.topologies, options.programs):
        rows.append(report(topology, program))
        # Minutes each: what is done is kept, should the rest not come to be.
        write_json(options.out, about | {"rows": rows})
        print(f"{program} for {topology}: compiled in {rows[-1]['compile_seconds']:.0f} s", flush=True)
    print(f"\n{about['network']}: {about['what']}.\n\n{table(rows)}")


if __name__ == "__main__":
    main()
