"""Tests of the figure files of a run."""

import numpy as np
from helpers import write_pictures_folder

from cifar_jax.data.resize import Resize
from cifar_jax.data.sources.folder import load_folder
from cifar_jax.data.splits import make_data
from cifar_jax.report.run_figures import write_pictures, write_samples
from cifar_jax.runtime.progress import EpochRow
from cifar_jax.train.evaluate import EvalResult

ROWS = [EpochRow(1, 1.0, 0.5, 1.0, 0.5, 1.0)]


def test_pictures_that_vanish_after_training_cost_one_figure(tmp_path, log_messages):
    root = write_pictures_folder(tmp_path / "pets", {"cats": 6, "dogs": 4})
    splits = load_folder(root).resized(Resize("eval-transform", 32, 36))
    data = make_data(splits.train, splits.train, splits._replace(test=splits.train))
    (tmp_path / "out").mkdir()
    write_samples(tmp_path / "out", data)
    (root / "cats/2.png").unlink()
    result = EvalResult(1.0, 0.5, np.array([[3, 3], [2, 2]]), np.zeros((10, 2), np.float32))
    write_pictures(tmp_path / "out", data, ROWS, result, result, seed=0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"samples.png", "curves.png", "confusion.png"}
    assert any("predictions.png is left out" in m and "cats/2.png does not exist" in m for m in log_messages)
