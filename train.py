"""Trains a dense head on a frozen ImageNet ResNet50 for CIFAR-10. `python train.py --help` lists the options."""

import sys

try:
    from cifar_jax.cli.main import run
except KeyboardInterrupt:  # imports take a second or two
    sys.exit(130)

run(["train", *sys.argv[1:]])
