"""What is measured: each section is a function of a `Bench` that gives the rows of a table."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import machine
from benchmarks.bench import ON_CPU, ON_GPU, TEST, TRAIN, Bench, Row, Section
from benchmarks.keras_notebook import make_notebook, make_predict
from benchmarks.onnx_runtime import make_onnx_runtime
from benchmarks.ours import make_epoch, make_heads, make_ours, make_products
from benchmarks.pytorch import export_onnx, make_pytorch
from benchmarks.worker import Worker, interleaved

EPOCHS = 4  # of the notebook, and of `train` by default
# Largest difference of features from ours at which the work counts as the same.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
OURS = {"torchvision": "cifar_jax, torchvision's network", "keras": "cifar_jax, Keras's network"}
TORCH, KERAS = OURS.values()


class Contender(NamedTuple):
    """An extractor.

    Attributes:
      make: a function that makes it.
      arguments: of that.
      ours: the row of this project that a peer is compared with.
      batch_sizes: from which a peer takes the fastest; ours chooses for itself.
    """

    make: Callable[..., Any]
    arguments: tuple[Any, ...]
    ours: str | None = None
    batch_sizes: tuple[int | None, ...] = (None,)


def backbone(bench: Bench) -> Section:
    """Features on the CPU, ours and the peers'."""
    files, size = bench.networks, bench.sizes.image_size
    contenders = {OURS[kind]: Contender(make_ours, (path, size)) for kind, path in files.ours.items()}
    unmeasured = []
    if bench.sizes.peers:
        onnx = bench.directory / "network.onnx"
        bench.elsewhere(export_onnx, files.torchvision, onnx, size)
        contenders["ONNX Runtime"] = Contender(make_onnx_runtime, (onnx,), TORCH, (8, 32))
        contenders["PyTorch, channels last"] = Contender(make_pytorch, (files.torchvision, size, False), TORCH, (8, 32))
        name = "PyTorch, channels last, compiled"
        if machine.has_compiler():
            # One size, as each is compiled for a minute.
            contenders[name] = Contender(make_pytorch, (files.torchvision, size, True), TORCH, (32,))
        else:
            unmeasured = [Row(name, [], note="not measured: torch.compile needs a C++ compiler, and there is none")]
        contenders["Keras, predict"] = Contender(make_predict, (files.keras, size), KERAS, (8, 32))
    rows = extraction(bench, contenders, bench.images[0][: bench.sizes.images], ON_CPU)
    about = f"uint8 images in, features of a ResNet50 at {size}x{size} out, float32, on the CPU"
    return Section("Backbone", about, "images/s", rows + unmeasured)


def gpu(bench: Bench) -> Section:
    """The same on the GPU, against compiled PyTorch."""
    files, size, rows = bench.networks, bench.sizes.image_size, []
    images = np.resize(bench.images[0], (bench.sizes.gpu_images, 32, 32, 3))
    for precision, tolerance in TOLERANCES.items():
        ours = f"cifar_jax, {precision}"
        theirs = files.torchvision, size, True, "cuda", precision
        contenders = {
            ours: Contender(make_ours, (files.ours["torchvision"], size, precision)),
            f"PyTorch, channels last, compiled, {precision}": Contender(make_pytorch, theirs, ours, (256,)),
        }
        rows += extraction(bench, contenders, images, ON_GPU, tolerance)
    about = f"uint8 images in, features of a ResNet50 at {size}x{size} out, on the GPU; float32 without TF32"
    return Section("Backbone on the GPU", about, "images/s", rows)


def extraction(
    bench: Bench,
    contenders: Mapping[str, Contender],
    images: np.ndarray,
    on: Mapping[str, str],
    tolerance: float = TOLERANCES["float32"],
) -> list[Row]:
    """Rows of extractors that are seen to agree, and then take turns.

    Args:
      bench: what there is.
      contenders: by the names of their rows.
      images: uint8 [n, 32, 32, 3].
      on: environment variables that choose the device.
      tolerance: of the features.
    """
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(bench.worker(c.make, *c.arguments, on=on)) for name, c in contenders.items()
        }
        ours = {name: contender.ours for name, contender in contenders.items()}
        called = {name: partial(worker, images, min(len(images), 256)) for name, worker in workers.items()}
        differences = agreement(called, ours, tolerance)
        batches = {name: fastest(worker, images, contenders[name].batch_sizes) for name, worker in workers.items()}
        timed = {name: partial(worker.seconds, images, batches[name]) for name, worker in workers.items()}
        seconds = interleaved(timed, bench.sizes.rounds)
    return [
        Row(
            name,
            [len(images) / s for s in seconds[name]],
            ours[name],
            f"{batches[name]} at a time" if batches[name] else "",
            differences.get(name),
        )
        for name in workers
    ]


def agreement(
    results: Mapping[str, Callable[[], np.ndarray]],
    ours: Mapping[str, str | None],
    tolerance: float = TOLERANCES["float32"],
) -> dict[str, float]:
    """How far the results of peers are from ours, relative to the largest value.

    Raises:
      RuntimeError: when it is further than `tolerance`: what is not the same work is not compared.
    """
    found = {name: result() for name, result in results.items()}
    differences = {}
    for name, mine in ours.items():
        if mine is not None:
            differences[name] = float(np.abs(found[name] - found[mine]).max() / np.abs(found[mine]).max())
            if not differences[name] <= tolerance:
                raise RuntimeError(f"what {name} computes differs from ours by {differences[name]:.1e}")
    return differences


def fastest(worker: Worker, images: np.ndarray, batch_sizes: tuple[int | None, ...]) -> int | None:
    """The batch size at which an extractor is fastest; it has then run at each of them twice."""
    return min(batch_sizes, key=lambda size: min(worker.seconds(images, size) for _ in range(2)))


def job(bench: Bench) -> Section:
    """The seed's whole job, and a second run on cached features."""
    sizes, weights = bench.sizes, bench.networks.ours["keras"]
    images, total = bench.images[0][: sizes.images], sum(sizes.job)
    first, notebook = f"cifar_jax, first run: {total:,} images once", "the Keras notebook"
    widths: dict[int, Path | str] = {2048: weights, 512: "demo"} if sizes.peers else {sizes.in_features: weights}
    second = {f"cifar_jax, second run, {width} features": of for width, of in widths.items()}
    for of in second.values():
        bench.first_run(of)
    with ExitStack() as stack:
        ours = stack.enter_context(bench.worker(make_ours, weights, sizes.image_size))
        ours(images)
        timed: dict[str, Callable[[], float]] = {"features": partial(ours.seconds, images)}
        timed |= {name: partial(lambda of: bench.full_job(of).seconds, of) for name, of in second.items()}
        if sizes.peers:
            peer = stack.enter_context(
                bench.worker(make_notebook, bench.networks.keras, sizes.image_size, *bench.images)
            )
            timed[notebook] = partial(_notebook_seconds, peer, TEST / sizes.notebook[1])
        seconds = interleaved(timed, sizes.rounds)
    scaled = total / len(images)
    parts = zip(seconds.pop("features"), seconds[next(iter(second))], strict=True)
    through = EPOCHS * (TRAIN + TEST) + 2 * TEST
    note = f"features of {len(images)} images scaled to {total:,}, and the second run"
    rows = [Row(first, [features * scaled + rest for features, rest in parts], note=note)]
    if sizes.peers:
        num_train, num_val = sizes.notebook
        note = f"`fit`, `evaluate` and `predict` of {num_train} + {num_val} images scaled to {through:,}"
        rows.append(Row(notebook, seconds.pop(notebook), first, note))
    note = "measured in full, from the command to its end"
    rows += [Row(name, values, note=note) for name, values in seconds.items()]
    work = f"features at {sizes.image_size}x{sizes.image_size}, {EPOCHS} epochs, an evaluation after each, pictures"
    about = f"{work}; imports and reading files count on our side alone, compiling the backbone on neither"
    return Section("Whole job", about, "s", rows)


def _notebook_seconds(peer: Worker, scale: float) -> float:
    """Seconds of the whole notebook: `fit` with validation, then `evaluate` and `predict` of the validation images."""
    seconds = peer()
    return scale * (EPOCHS * seconds["fit"] + seconds["evaluate"] + seconds["predict"])


def head(bench: Bench) -> Section:
    """An epoch of the head on cached features."""
    sizes = bench.sizes
    epoch, products = f"cifar_jax, {sizes.head:,} cached features", "the epoch's matrix products alone"
    with (
        bench.worker(make_epoch, sizes.head, sizes.in_features) as ours,
        bench.worker(make_products, sizes.head, sizes.in_features) as bare,
    ):
        ours(), bare()
        seconds = interleaved({epoch: ours.seconds, products: bare.seconds}, sizes.rounds)
    about = f"{sizes.in_features} features, 64 examples a step, forwards, backwards and update"
    rows = [Row(epoch, seconds[epoch]), Row(products, seconds[products], epoch)]
    return Section("An epoch of the head", about, "s", rows)


def heads(bench: Bench) -> Section:
    """Many heads in one call, and one after the other."""
    (count, examples), width = bench.sizes.heads, bench.sizes.in_features
    one_call, in_turn = f"cifar_jax, {count} heads in one compiled call", f"{count} heads one after the other"
    with ExitStack() as stack:
        made = {one_call: True, in_turn: False}
        workers = {
            name: stack.enter_context(bench.worker(make_heads, count, examples, width, together))
            for name, together in made.items()
        }
        differences = agreement(workers, {one_call: None, in_turn: one_call})
        seconds = interleaved({name: worker.seconds for name, worker in workers.items()}, bench.sizes.rounds)
    about = f"an epoch on {examples:,} cached features of width {width}, each head with parameters of its own"
    rows = [Row(one_call, seconds[one_call]), Row(in_turn, seconds[in_turn], one_call, "", differences[in_turn])]
    return Section("Many heads", about, "s", rows)


def memory(bench: Bench) -> Section:
    """Peak resident memory of whole jobs."""
    sizes, weights = bench.sizes, bench.networks.ours["keras"]

    def small(count: int, image_size: int) -> float:
        num_test = count // 6
        return bench.job(weights, image_size, count - num_test, num_test, f"cache-{count}-{image_size}").peak_gb

    few, full, total = sizes.few, sizes.at_full_size, sum(sizes.job)
    rows = [
        Row(f"{few:,} images at {sizes.job_size}x{sizes.job_size}", [small(few, sizes.job_size)]),
        Row(f"{total:,} images at {sizes.job_size}x{sizes.job_size}", [bench.first_run(weights).peak_gb]),
        Row(f"{full:,} images at {sizes.image_size}x{sizes.image_size}", [small(full, sizes.image_size)]),
    ]
    about = "peak resident memory of a first run with 2048 features, of which 60,000 images have 0.49 GB"
    return Section("Memory", about, "GB", rows)


SECTIONS = {"backbone": backbone, "job": job, "head": head, "heads": heads, "memory": memory, "gpu": gpu}
