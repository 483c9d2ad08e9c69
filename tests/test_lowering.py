"""Programs lowered for GPUs and TPUs on a machine without any: no step depends on the machine at hand."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.traverse_util import unflatten_dict
from helpers import NARROW
from tasks import batch_of, on_features, on_images, start_of

from cifar_jax.config import TrainConfig
from cifar_jax.data.augment import AUGMENTATIONS
from cifar_jax.models.folded import features_of, prepare
from cifar_jax.models.head import dense_logits, init_head
from cifar_jax.models.preprocess import CAFFE
from cifar_jax.pretrained import Backbone
from cifar_jax.pretrained.merge import variable_shapes
from cifar_jax.train.finetune import make_network, trainable
from cifar_jax.train.from_config import image_augmentation
from cifar_jax.train.losses import cross_entropy
from cifar_jax.train.step import make_train_step, scan_steps
from cifar_jax.train.task import finetune_task

TX = optax.sgd(0.1, momentum=0.9)
AUGMENT = image_augmentation(tuple(AUGMENTATIONS))
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def backbone():
    variables = unflatten_dict({path: jnp.ones(shape) for path, shape in variable_shapes(NARROW).items()})
    return Backbone(NARROW, CAFFE, 64, variables)


@pytest.fixture(scope="module")
def head():
    return init_head(KEY, NARROW.features, (8,), 10)


@pytest.fixture(params=["cuda", "tpu"])
def platform(request):
    return request.param


IMAGES = jnp.zeros((8, 32, 32, 3), jnp.uint8)
BATCH = batch_of(IMAGES, jnp.zeros(8, jnp.int32))


def lowered(platform, function, *args):
    """The StableHLO program for a platform."""
    exported = jax.export.export(function, platforms=[platform])(*args)
    assert exported.platforms == (platform,)
    return exported.mlir_module()


def products(program):
    """Lines of a program with matrix products and convolutions."""
    return re.findall(r"stablehlo\.(?:dot_general|convolution).*", program)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_extraction(backbone, platform, precision):
    prepared = prepare(backbone, precision=precision, platform={"cuda": "gpu"}.get(platform, platform))
    program = lowered(platform, jax.jit(features_of), prepared, IMAGES)
    # The stem and the 3x3 kernels are convolutions, also small ones, which are matrix products on a CPU.
    assert len(products(program)) == 9 and len(re.findall(r"stablehlo\.convolution", program)) == 3
    full = [line for line in products(program) if "HIGHEST" in line]
    assert len(full) == (9 if precision == "float32" else 0)
    assert ("bf16" in program) == (precision == "bfloat16")


def step_of(task, augment=None):
    return jax.jit(make_train_step(task.forward, cross_entropy, TX, augment=augment))


def test_live_step(backbone, head, platform):
    task = on_images(head, backbone, (IMAGES, jnp.zeros(8, jnp.int32)), size=64)
    program = lowered(platform, step_of(task, AUGMENT), start_of(task, TX), backbone, BATCH, KEY)
    assert "stablehlo.convolution" in program and all("HIGHEST" in line for line in products(program))


def test_finetune_step(backbone, head, platform):
    function = trainable(make_network(TrainConfig(mode="finetune"), NARROW, platform), backbone, 64)
    task = finetune_task(head, dense_logits, backbone.variables, function, {})
    program = lowered(platform, step_of(task, AUGMENT), start_of(task, TX), {}, BATCH, KEY)
    # Three forward, and their gradients by images, but for the stem, and by kernels. On a CPU they are matrix products.
    assert len(re.findall(r"stablehlo\.convolution", program)) == 8
    assert all("HIGHEST" in line for line in products(program))


def test_cached_epoch(head, platform):
    features, labels = jnp.zeros((20, NARROW.features)), jnp.zeros(20, jnp.int32)
    indices, counts = jnp.zeros((3, 8), jnp.int32), jnp.full(3, 8, jnp.int32)
    task = on_features(head, (features, labels))
    epoch = jax.jit(scan_steps(make_train_step(task.forward, cross_entropy, TX)))
    program = lowered(platform, epoch, start_of(task, TX), {}, features, labels, indices, counts, KEY)
    assert "stablehlo.while" in program and all("HIGHEST" in line for line in products(program))
