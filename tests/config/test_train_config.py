"""Tests of the configuration: options in groups that are typed, recorded and set in Python by name alone."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
from helpers import command, is_one_error

from cifar_jax.cli.options import parse_train
from cifar_jax.config import (
    FINETUNE_ONLY,
    BackboneConfig,
    DataConfig,
    FinetuneConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    preset,
)
from cifar_jax.config.option_groups import (
    DEFAULTS,
    FIELDS,
    GROUP_OF,
    GROUPS,
    OF_A_PROCESS,
    OF_THE_COMMAND,
    PATHS,
    RUN_ONLY,
)
from cifar_jax.errors import UserError
from cifar_jax.runs.directory import recorded

CONFIGS = Path(__file__).parent / "configs"  # written before options had groups
FINETUNE = FinetuneConfig(2, 0.01, "batch", 0.8, False, 16, True)
OPTIM = OptimConfig(
    mode="finetune",
    hidden=(64, 32),
    epochs=9,
    batch_size=48,
    learning_rate=0.05,
    momentum=0.5,
    nesterov=True,
    weight_decay=1e-4,
    schedule="cosine",
    warmup_epochs=1.5,
    label_smoothing=0.1,
    clip_norm=2.0,
    seed=7,
    devices=1,
    deterministic=True,
)
RUN = RunConfig(
    out="/runs/finetune",
    resume=True,
    checkpoint_every=5,
    keep_checkpoints=4,
    data_dir="/data",
    cache_dir="/cache",
    cache_limit=3.0,
    profile="/traces",
    progress=False,
    debug=True,
)
WRITTEN = {
    "finetune": TrainConfig(
        "pretrain",
        DataConfig("shapes", 1000, 200, 0.25, shuffle=False, augment=("flip", "cutout")),
        BackboneConfig("random-w16", None, 64, "bfloat16", 128, "float32"),
        OPTIM,
        FINETUNE,
        RUN,
    ),
    "cached": TrainConfig(
        "demo",
        DataConfig("shapes", 1000, 200, 0.25, shuffle=False),
        BackboneConfig("random-w16", "torchvision", 64, "bfloat16", 128, "bfloat16"),
        replace(OPTIM, mode="cached"),
        FinetuneConfig(),
        replace(RUN, out="/runs/cached"),
    ),
    "pretrain": preset("pretrain"),
}


def read(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", WRITTEN)
def test_old_flat_config_files_are_read(name):
    config = TrainConfig.from_json(read(name))
    assert config == WRITTEN[name]
    # The same values are written again, and beside them what has been added since, with its default.
    assert recorded(config) == config.to_json() == {**DEFAULTS, **read(name)}


def test_old_configs_cover_every_group():
    for group in GROUPS:
        usual = getattr(TrainConfig(), group)
        assert any(getattr(WRITTEN[name], group) != usual for name in ("finetune", "cached")), group


def test_every_option_is_in_exactly_one_group():
    names = [field.name for group in GROUPS.values() for field in fields(group)]
    assert len(names) == len(set(names)) == len(GROUP_OF)
    assert {"preset", *GROUPS} == {field.name for field in fields(TrainConfig)}
    assert not {"preset", *GROUPS} & set(names)  # such an option could not be set in Python


def test_options_are_set_and_read_without_groups():
    config = TrainConfig(epochs=2, out="x", augment=("flip",), mode="live", image_size=64)
    assert (config.epochs, config.out, config.augment, config.image_size) == (2, "x", ("flip",), 64)
    assert (config.optim.epochs, config.run.out, config.data.augment) == (2, "x", ("flip",))
    assert config == TrainConfig(
        data=DataConfig(augment=("flip",)),
        backbone=BackboneConfig(image_size=64),
        optim=OptimConfig(epochs=2, mode="live"),
        run=RunConfig(out="x"),
    )
    changed = replace(config, epochs=3, run=RunConfig(out="y", overwrite=True))
    assert (changed.epochs, changed.mode, changed.out, changed.overwrite) == (3, "live", "y", True)
    assert (config.epochs, config.out) == (2, "x")
    changes = {"epochs": 2, "out": "runs/notebook", "overwrite": True}
    assert replace(preset("demo"), **changes).options() == preset("demo").options() | changes


def test_single_option_overrides_its_group():
    assert TrainConfig(optim=OptimConfig(epochs=2, seed=5), epochs=3).optim == OptimConfig(epochs=3, seed=5)
    with pytest.raises(UserError, match=r"--epochs must be at least 1, got 0\."):
        TrainConfig(optim=OptimConfig(epochs=0))


@pytest.mark.parametrize("make", [lambda: TrainConfig(epoch=2), lambda: replace(TrainConfig(), epoch=2)])
def test_unknown_option_raises_type_error(make):
    with pytest.raises(TypeError, match=r"There is no option 'epoch'\. Did you mean epochs\?"):
        make()


def test_unknown_field_raises_attribute_error():
    with pytest.raises(AttributeError, match="'TrainConfig' object has no attribute 'epoch'"):
        TrainConfig().epoch  # noqa: B018
    assert not hasattr(TrainConfig(), "__fspath__")
    with pytest.raises(UserError, match="unknown fields: optim; remove them"):
        TrainConfig.from_json({"optim": {"epochs": 2}})


@pytest.mark.parametrize("name", WRITTEN)
def test_config_is_a_value(name):
    config = WRITTEN[name]
    for same in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config)):
        assert same == config and hash(same) == hash(config) and repr(same) == repr(config)
    assert eval(repr(config)) == config
    assert config != replace(config, seed=8) and len({config, replace(config, seed=8), replace(config)}) == 2
    with pytest.raises(FrozenInstanceError):
        config.epochs = 3


def test_option_sets():
    assert set(FINETUNE_ONLY) == {field.name for field in fields(FinetuneConfig)}
    assert set(RUN_ONLY) == {field.name for field in fields(RunConfig)}
    assert set(RUN_ONLY) - set(OF_THE_COMMAND) == {"data_dir", "cache_dir", "cache_limit"}
    assert set(RUN_ONLY) - set(OF_A_PROCESS) == {"checkpoint_every"}
    assert set(PATHS) == {"out", "config", "data_dir", "cache_dir", "profile"}
    # A path option without the mark would be recorded as typed instead of as an absolute path.
    assert {name for name in FIELDS if name.endswith("_dir")} < set(PATHS)


def test_config_option_keeps_only_input_and_cache_locations(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(read("finetune")))
    original, rerun = WRITTEN["finetune"], parse_train(["--config", str(tmp_path)])
    assert rerun == replace(original, run=RunConfig(data_dir="/data", cache_dir="/cache", cache_limit=3.0))


# ---------------------------------------------------------------------------------------------------------------------
# Options of a preset or an earlier run that do not apply given the typed options


LIVE = {"mode": "live", "bn_momentum": 0.99, "zero_gamma": False}


@pytest.mark.parametrize(
    ("of", "typed", "changes"),
    [
        ("pretrain", "--mode live", LIVE),
        ("pretrain", "--mode=cached", LIVE | {"mode": "cached", "augment": ()}),
        ("pretrain", "--mode cached --mode live", LIVE),  # the last one counts
        ("pretrain", "--schedule constant", {"schedule": "constant", "warmup_epochs": 0.0}),
        ("pretrain", "--epochs 2", {"epochs": 2, "warmup_epochs": 0.0}),
        ("pretrain", "--epochs 3", {"epochs": 3, "warmup_epochs": 2.0}),
        ("pretrain", "--momentum 0", {"momentum": 0.0, "nesterov": False}),
        ("pretrain", "--momentum=0.0", {"momentum": 0.0, "nesterov": False}),
        ("pretrain", "--bn-statistics frozen", {"bn_statistics": "frozen", "bn_momentum": 0.99}),
        ("pretrain", "--bn_statistics=frozen", {"bn_statistics": "frozen", "bn_momentum": 0.99}),
        ("pretrain", "--momentum 0.5", {"momentum": 0.5}),
        ("demo", "--schedule constant", {"schedule": "constant"}),
        ("cached.json", "--mode live", {"mode": "live", "feature_dtype": "float32"}),
        ("cached.json", "--mode finetune", {"mode": "finetune", "feature_dtype": "float32"}),
        ("finetune.json", "--batch-size 8", {"batch_size": 8, "micro_batch": None}),
        ("finetune.json", "--batch-size 16", {"batch_size": 16}),
        ("finetune.json", "--mode live", {"mode": "live", **{name: FIELDS[name].default for name in FINETUNE_ONLY}}),
    ],
)
def test_inapplicable_preset_options_are_reset(of, typed, changes):
    default = ["--config", str(CONFIGS / of)] if of.endswith(".json") else ["--preset", of]
    default += ["--dataset", "shapes"]  # available on every machine
    assert parse_train([*typed.split(), *default]).options() == parse_train(default).options() | changes


@pytest.mark.parametrize(
    ("typed", "part"),
    [
        ("--preset pretrain --mode live --bn-momentum 0.9", "--bn-momentum has no meaning in --mode live"),
        ("--mode cached --preset pretrain --zero-gamma", "--zero-gamma has no meaning in --mode cached"),
        ("--preset pretrain --mode cached --augment flip", "--augment needs the pixels at every step"),
        ("--preset pretrain --mode live --feature-dtype float16", "--feature-dtype applies to --mode cached only"),
        ("--preset pretrain --schedule constant --warmup-epochs 2", "--warmup-epochs goes with --schedule cosine"),
        ("--preset pretrain --epochs 2 --warmup-epochs 2", "--warmup-epochs must be at least 0 and below --epochs 2"),
        ("--preset pretrain --momentum 0 --nesterov", "--nesterov needs --momentum"),
        ("--preset pretrain --bn-statistics frozen --bn-momentum 0.9", "--bn-momentum moves no statistics"),
        ("--preset pretrain --batch-size 8 --micro-batch 16", "--micro-batch must be at most --batch-size 8, got 16."),
        ("--preset demo --momentum 1", "--momentum must be at least 0 and below 1, got 1.0."),
    ],
)
def test_inapplicable_typed_options_are_refused(capsys, typed, part):
    is_one_error(command(capsys, "train", *typed.split()), 2, part)


def test_in_python_a_preset_drops_them_beside_the_options_that_are_given():
    pretrain = preset("pretrain").options()
    assert preset("pretrain", mode="live").options() == pretrain | LIVE
    assert preset("pretrain", epochs=2, out="x").options() == pretrain | {"epochs": 2, "warmup_epochs": 0.0, "out": "x"}
    assert preset("demo", mode="live", seed=3) == replace(preset("demo"), mode="live", seed=3)
    assert preset("demo") == preset("demo", **{}) == TrainConfig(**preset("demo").options())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "live", "bn_momentum": 0.9}, UserError, "--bn-momentum has no meaning in --mode live"),
        ({"epochs": "3"}, UserError, "--epochs must be a whole number, got '3'"),
        ({"epoch": 3}, TypeError, r"There is no option 'epoch'\. Did you mean epochs\?"),
    ],
)
def test_what_a_preset_does_not_take(options, error, message):
    with pytest.raises(error, match=message):
        preset("pretrain", **options)
    with pytest.raises(UserError, match="pretrian"):
        preset("pretrian")
