"""Makes weights/demo-resnet50-w16.safetensors, its provenance and its registry entry from a finished pretraining run.

    python train.py --preset pretrain --out runs/pretrain --resume
    python weights/export_demo.py runs/pretrain

`make demo-weights` does both; it takes one to two hours on two cores.
"""

import json
import sys
from typing import Any

import numpy as np

from cifar_jax import Backbone, Run, load_run, save_backbone
from cifar_jax.config import preset
from cifar_jax.config.option_groups import RUN_ONLY
from cifar_jax.files import write_json
from cifar_jax.pretrained.registry import weights_dir
from cifar_jax.runs.directory import METRICS
from cifar_jax.version import __version__

NAME, FILE = "demo", "demo-resnet50-w16.safetensors"
ABOUT = "A ResNet50 of a quarter of the width, pretrained from scratch by this project (--preset pretrain)"


def main(run_dir: str, feature_scale: str = "1") -> None:
    """Exports the backbone of a run, its features multiplied by a power of two."""
    run = load_run(run_dir)
    if run.summary["status"] != "complete" or run.config.optim.mode != "finetune":
        raise SystemExit(f"{run_dir} is no finished run in which the backbone was trained; nothing was exported.")
    dataset = run.summary["dataset"]
    backbone = scale_features(run.backbone, float(feature_scale))
    path = weights_dir() / FILE
    variant = f"torch-like; pretrained on {dataset['name']} {dataset['version']}"
    digest = save_backbone(path, backbone.replace(source=ABOUT, variant=variant), half=True)
    entry = {
        "file": FILE,
        "url": None,
        "digest": f"sha256:{digest}",
        "size": path.stat().st_size,
        "variant": variant,
        "licence": "Apache-2.0",
        "transform": None,
        "top1": f"{100 * run.summary['val_accuracy']:.1f} on {dataset['name']}",
        "about": f"{ABOUT}.",
    }
    registry = weights_dir() / "registry.json"
    others = json.loads(registry.read_text(encoding="utf-8"))
    write_json(registry, {NAME: entry} | {name: fields for name, fields in others.items() if name != NAME})
    write_json(path.with_suffix(".json"), provenance(run, float(feature_scale), digest))


def scale_features(backbone: Backbone, factor: float) -> Backbone:
    """The same network with features that are `factor` times as large.

    A relu lets a positive factor pass, so it is put into the last BatchNorms of the last stage and taken out of the
    convolutions that follow them. With a power of two no bit of a mantissa changes.
    """
    last = len(backbone.config.stage_sizes)
    params = {name: dict(part) for name, part in backbone.variables["params"].items()}
    for block in range(1, backbone.config.stage_sizes[-1] + 1):
        part = params[f"stage{last}_block{block}"]
        for name in {"bn3", "bn_proj"} & part.keys():
            part[name] = {leaf: value * np.float32(factor) for leaf, value in part[name].items()}
        if block > 1:
            part["conv1"] = part["conv1"] | {"kernel": part["conv1"]["kernel"] / np.float32(factor)}
    return backbone.replace(variables=backbone.variables | {"params": params})


def provenance(run: Run, feature_scale: float, digest: str) -> dict[str, Any]:
    """Where the file comes from, and how to make one like it."""
    summary, usual = run.summary, preset(run.config.preset).options()
    changed = {name: value for name, value in run.config.options().items() if value != usual[name]}
    options = "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items() if name not in RUN_ONLY)
    rows = (run.path / METRICS).read_text(encoding="utf-8").splitlines()
    return {
        "file": FILE,
        "sha256": digest,
        "command": f"python train.py --preset {run.config.preset}{options}",
        "feature_scale": feature_scale,
        "code_version": __version__,
        "config": run.config.to_json() | dict.fromkeys(("data_dir", "cache_dir", "out")),
        "dataset": summary["dataset"],
        "num_train": summary["num_train"],
        "num_test": summary["num_test"],
        "test_accuracy": summary["val_accuracy"],
        "test_accuracy_interval_95": summary["val_accuracy_interval_95"],
        "test_loss": summary["val_loss"],
        "hours": round(sum(json.loads(row)["seconds"] for row in rows) / 3600, 2),
        "device": summary["device"],
        "packages": {name: text for name, text in summary["packages"].items() if name != "cifar-jax"},
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
