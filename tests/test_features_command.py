"""The features command: what it writes, of what, and what it refuses; and the trace of --profile."""

import json

import jax
import numpy as np
import pytest
from helpers import TINY, command, files_below, full_disk, is_one_error, narrow_networks
from PIL import Image

from cifar_jax import extraction
from cifar_jax.data import load_splits
from cifar_jax.features import make_extractor
from cifar_jax.images import read_image
from cifar_jax.pretrained import load_backbone, random_backbone, save_backbone
from cifar_jax.preprocess import Preprocessing
