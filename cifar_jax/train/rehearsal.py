"""Traces a training job without computing it, so that errors in its first step appear before any file is written."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from cifar_jax.config import TrainConfig
from cifar_jax.features.extraction import Extracted
from cifar_jax.runtime.sharding import round_up
from cifar_jax.train.from_config import Parts, compose
from cifar_jax.train.load_inputs import Inputs
from cifar_jax.train.step import TrainState
from cifar_jax.train.task import Batch


def state_shapes(config: TrainConfig, inputs: Inputs, parts: Parts, mesh: Mesh, steps: bool = False) -> TrainState:
    """Shapes of the initial state that `prepare` would make, without computing anything or reading image data.

    With `steps` a step is traced as well, so that errors in user-supplied functions are raised here; takes seconds if
    it includes a large network.
    """
    features = np.zeros((1, inputs.backbone.num_features), np.float32)
    is_cached = config.optim.mode == "cached"
    extracted = Extracted(dict.fromkeys(inputs.data.parts, features), 0, 0.0, 0.0) if is_cached else None

    def begin(batch: Batch, key: PRNGKeyArray) -> TrainState:
        composed = compose(config, inputs, parts, mesh, extracted)
        state = composed.state()
        if steps:
            composed.train_step()(state, composed.task.frozen, batch, key)
        return state

    size = round_up(mesh, config.optim.batch_size)
    example = features[0] if is_cached else inputs.data.train.images
    shape = example.shape[-1:] if is_cached else example.shape[1:]
    of: Any = jax.ShapeDtypeStruct
    labels = of((size,), inputs.data.train.labels.dtype)
    batch = Batch(of((size, *shape), example.dtype), labels, of((size,), jnp.float32))
    shapes: TrainState = jax.eval_shape(begin, batch, jax.eval_shape(lambda: jax.random.key(0)))
    return shapes
