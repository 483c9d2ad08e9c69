"""Facts about a trained classifier in words, for its model card and its web page."""

import re
from typing import Any

from cifar_jax.export.rgb import in_rgb
from cifar_jax.export.trained_model import TrainedModel
from cifar_jax.models.resnet import network_name
from cifar_jax.pretrained import UNTRAINED, registry

# Data sets of TFDS under the names that they have on the hub.
DATASETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
KINDS = {
    "folder": "a folder of pictures",
    "npz": "an .npz file of images",
    "shapes": "synthetic images that cifar-jax draws",
    "tfds": "from TensorFlow Datasets",
    "tfds-directory": "from TensorFlow Datasets",
}

# A directory of the hub's own download cache says which model it holds.
CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")
# What `pretrain` writes into the variant of its weights.
PRETRAINED = re.compile(r"pretrained on ([^;]+)")
PASSED = "weights that were passed to the program"

ENDED = {"interrupted": "was interrupted", "diverged": "diverged"}  # by status; else it failed
WITH = "with cifar-jax, a codebase for transfer learning in JAX"

Rows = list[tuple[str, str]]  # of a table with two columns


def percent(fraction: float | None) -> str:
    """Formats a fraction as `58.6 %`; a dash for what is not defined."""
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def count(number: int | None) -> str:
    """Formats a number as `50,000`; a dash for what is not known."""
    return "-" if number is None else f"{number:,}"


def hub_id_of(model: TrainedModel) -> str | None:
    """The name of the data set on the hub, if it is a public one; a folder is not, whatever it is called."""
    if not model.about["data"]["kind"].startswith("tfds"):
        return None
    return DATASETS.get(model.run.summary["dataset"]["name"])


def is_subset(model: TrainedModel) -> bool:
    """Whether only some of the test images of the data set were scored."""
    return model.run.config.data.test_examples is not None and model.about["scores"]["split"] == "test"


def is_random(model: TrainedModel) -> bool:
    """Whether the backbone started from random weights."""
    return _named_weights(model) in UNTRAINED


def base_model_of(model: TrainedModel) -> str | None:
    """The name of the pretrained model on the hub, if its weights lie in the hub's download cache, which says it."""
    cached = CACHED.search(_named_weights(model))
    return "/".join(cached.groups()) if cached else None


def _named_weights(model: TrainedModel) -> str:
    """The option --weights; empty if a backbone was passed in its place."""
    return "" if "backbone" in model.run.summary.get("parts", {}) else model.run.config.backbone.weights


def origin(model: TrainedModel) -> str:
    """A sentence that says which weights the classifier was made from, and which of its layers were trained."""
    frozen, weights = model.run.config.finetune.freeze_stages, _weights(model)
    if model.run.config.optim.mode != "finetune":
        return f"Only its head was trained, {WITH}; its backbone keeps {weights}."
    if frozen:
        return f"It was trained {WITH}, from {weights}, which {_kept(frozen)} keep."
    return f"All its layers were trained, {WITH}, from {weights}."


def _kept(stages: int) -> str:
    return "the stem and the first stage" if stages == 1 else f"the stem and the first {stages} stages"


def _weights(model: TrainedModel) -> str:
    name = base_model_of(model) or model.about["backbone"]["weights"]
    return "random weights" if is_random(model) else f"the pretrained weights {name}" if name else PASSED


def pretrained_on(model: TrainedModel) -> str:
    """The images that the weights of the backbone come from; empty if that is not known."""
    if stated := PRETRAINED.search(model.about["backbone"]["variant"]):
        return stated[1]
    known = _known(model)
    return "ImageNet" if known and known.url else ""


def _known(model: TrainedModel) -> registry.Entry | None:
    """The registry's entry for the weights of the backbone."""
    about = model.about["backbone"]
    return registry.entries().get(about["weights"]) if about["licence"] else None


def incomplete(model: TrainedModel) -> str:
    """A sentence that says how the training of an incomplete run ended; empty if the run is complete."""
    summary = model.run.summary
    status = summary.get("status", "complete")
    if status == "complete":
        return ""
    return (
        f"Training {ENDED.get(status, 'failed')} after {summary['epochs']} of {model.run.config.optim.epochs} epochs; "
        f"these are the weights of epoch {summary['selected_epoch']}."
    )


def selection(model: TrainedModel) -> str:
    """Sentences that say what the scored images had to do with the choice of the epoch."""
    summary = model.run.summary
    if model.about["scores"]["split"] != "test":
        return (
            "These images chose the epoch, so the accuracy on others is likely to be a little lower. The test images "
            "were not scored, as training did not end."
        )
    if summary.get("val_split") == "held_out":
        return (
            f"Epoch {summary['selected_epoch']} of {summary['epochs']} was chosen for its accuracy on "
            f"{count(summary['num_val'])} other images, which were not trained on; the test images chose nothing."
        )
    return "The test images were scored after every epoch; the weights are those of the last one, whatever its score."


def data(model: TrainedModel) -> dict[str, Any]:
    """Name, kind and origin of the data set, and how many images of it had which use."""
    summary, options, hub_id = model.run.summary, model.run.config.data, hub_id_of(model)
    dataset, kind = summary["dataset"], model.about["data"]["kind"]
    subset = "a random subset, balanced over the classes"
    train, test = ([count(summary[f"num_{split}"])] for split in ("train", "test"))
    if options.train_examples is not None:
        train.append(subset)
    if options.test_examples is not None:
        test.append(subset)
    elif kind != "shapes" and options.train_examples is None:
        total = summary["num_train"] + summary["num_test"] + (summary["num_val"] if options.val_fraction else 0)
        is_share = summary["num_test"] == round(options.test_fraction * total)
        test.append(f"{100 * options.test_fraction:g} % of all images" if is_share else "those of the data set")
    splits = [("training images", ", ".join(train))]
    if summary.get("val_split") == "held_out":
        fraction = options.val_fraction
        share = f"{100 * fraction:g} % of the training images" if fraction else "the data set's own validation images"
        splits.append(("held-out images", f"{count(summary['num_val'])}, {share}, to choose the epoch"))
    splits.append(("test images", ", ".join(test)))
    if skipped := len(dataset.get("skipped") or ()):
        splits.append(("left out", f"{count(skipped)} files that could not be read"))
    name = f"{dataset['name']} {dataset.get('version') or ''}".strip()
    return {"name": name, "kind": kind, "hub_id": hub_id, "source": KINDS[kind], "splits": splits}


def resized(model: TrainedModel) -> str:
    """Says how a picture of any size becomes the input."""
    resize, side = model.resize, model.side
    if resize.method == "eval-transform":
        return (
            f"its shorter side is resized to {resize.shorter} pixels ({resize.interpolation}, with antialiasing), and "
            f"the centre of {side}x{side} is cropped"
        )
    return "unless it has that size, its centred square is resized (bicubic, with antialiasing)"


def inside(model: TrainedModel) -> list[str]:
    """Sentences that say what the network does with its input, from the first step to the last."""
    backbone, size = model.resnet("hub"), model.backbone.image_size
    pixels, steps = in_rgb(backbone).preprocessing, []  # as `write_pytorch` stores it
    if model.factor > 1:
        steps.append(f"Pixels are repeated {model.factor} times in both directions (nearest), to {size}x{size}.")
    if pixels.scale != 1:
        steps.append(f"Pixels are divided by {pixels.scale:g}.")
    if any(pixels.mean):
        steps.append(f"The mean of each channel is subtracted: {', '.join(map(str, pixels.mean))}.")
    if pixels.std != (1, 1, 1):
        steps.append(f"Each channel is divided by its standard deviation: {', '.join(map(str, pixels.std))}.")
    steps.append(f"The network computes {count(backbone.num_features)} features.")
    hidden, last = _hidden(model), f"a dense layer of {count(len(model.class_names))} units"
    layers = f"dense layers of {hidden} with ReLU, {last}" if hidden else last
    steps.append(f"The head, {layers} and softmax, turns them into probabilities.")
    return steps


def training(model: TrainedModel) -> Rows:
    """Options of the training that decide its result; those that were left at zero are left out."""
    optim, finetune = model.run.config.optim, model.run.config.finetune
    summary, parts = model.run.summary, model.run.summary.get("parts", {})
    modes = {
        "cached": "the head only, on cached features of the images",
        "live": "the head only, with the frozen backbone in every step",
        "finetune": f"all but {_kept(finetune.freeze_stages)}" if finetune.freeze_stages else "all",
    }
    hidden = _hidden(model)
    rows = {
        "trained layers": modes[optim.mode],
        "hidden layers of the head": f"{hidden}, ReLU" if hidden else "none",
        "epochs": f"{summary['selected_epoch']} of {optim.epochs}",
        "batch size": str(optim.batch_size),
    }
    if "tx" in parts:
        rows["optimizer"] = f"a function, {parts['tx']}"
    else:
        momentum = f", momentum {optim.momentum:g}" + " (Nesterov)" * optim.nesterov if optim.momentum else ""
        rows["optimizer"] = f"SGD{momentum}"
        rows["learning rate"] = _rates(model)
        if optim.weight_decay:
            rows["weight decay"] = f"{optim.weight_decay:g}, of kernels"
        if optim.clip_norm:
            rows["gradients clipped to norm"] = f"{optim.clip_norm:g}"
    if "loss_fn" in parts:
        rows["loss"] = f"a function, {parts['loss_fn']}"
    else:
        smoothing = f", label smoothing {optim.label_smoothing:g}" if optim.label_smoothing else ""
        rows["loss"] = "cross-entropy" + smoothing + ", classes weighted" * (optim.class_weights != "none")
    augment = model.run.config.data.augment
    if "augment" in parts or augment:
        rows["augmentation"] = f"a function, {parts['augment']}" if "augment" in parts else ", ".join(augment)
    if optim.mode == "finetune":
        of_batch = finetune.bn_statistics == "batch"
        rows["BatchNorm"] = "statistics of each batch" if of_batch else "the pretrained statistics"
    if not model.run.config.data.shuffle:
        rows["order"] = "not shuffled"
    return [*rows.items(), ("seed", str(optim.seed)), ("precision of the backbone", str(summary.get("precision")))]


def _hidden(model: TrainedModel) -> str:
    """Widths of the hidden layers of the head; empty if there are none."""
    widths = [count(len(layer["bias"])) for layer in model.dense_layers("hub")[:-1]]
    return f"{' and '.join(widths)} units" if widths else ""


def _rates(model: TrainedModel) -> str:
    """The learning rates, with the epochs from which they applied, and the schedule."""
    optim, values = model.run.config.optim, list[str]()
    for rate in model.run.summary.get("learning_rates") or [{"from_epoch": 1, "learning_rate": optim.learning_rate}]:
        of_backbone = rate.get("backbone_learning_rate")
        value = f"{rate['learning_rate']:g}" + (f", of the backbone {of_backbone:g}" if of_backbone else "")
        values.append(value if not values else f"from epoch {rate['from_epoch']} {value}")
    warmup = f" after {optim.warmup_epochs:g} epochs of warmup" if optim.warmup_epochs else ""
    return "; ".join(values) + (f", with cosine decay to zero{warmup}" if optim.schedule == "cosine" else "")


def backbone(model: TrainedModel) -> Rows:
    """Network of the backbone, and name, origin, licence and digest of the weights that it started from."""
    about, base = model.about["backbone"], base_model_of(model)
    known = _known(model)
    tuned = about["trained_layers"] == "all"
    rows = [("network", network_name(model.resnet("hub").config))]
    if is_random(model):
        rows.append(("weights", "random"))
    else:
        place = f", {known.url}" if known and known.url else ", part of cifar-jax" if known else ""
        place = f", https://huggingface.co/{base}" if base else place
        rows += [
            ("weights", (base or about["weights"] or PASSED) + place),
            ("licence", about["licence"] or "not known"),
        ]
        rows.append(("variant", about["variant"]))
    return [*rows, ("SHA-256 after training" if tuned else "SHA-256", f"{about['sha256'][:16]}…")]
