"""Trains a dense head on a frozen ImageNet ResNet50 for CIFAR-10. `python train.py --help` lists the options."""

import sys

from cifar_jax.cli import run

run(["train", *sys.argv[1:]])
