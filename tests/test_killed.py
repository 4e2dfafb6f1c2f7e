"""Real processes, killed by SIGKILL within an epoch and started again."""

import csv
import multiprocessing
import signal

import numpy as np
import pytest
import run_to_kill
from common import BACKEND, check_run
from processes import FORK, succeeds
from run_to_kill import InWindows, Momentum

from keras_dwa import DynamicWeightAverage

SPAWN = multiprocessing.get_context("spawn")


def run(folder, save_freq, rule=Momentum, stop=None):
    folder.mkdir(exist_ok=True)
    assert succeeds(run_to_kill.train, folder, save_freq, rule, stop)


def run_and_kill(folder, save_freq, epoch, batch, rule=Momentum, context=FORK):
    folder.mkdir(exist_ok=True)
    reached = context.Event()
    arguments = (folder, save_freq, rule, (epoch, batch, reached))
    process = context.Process(target=run_to_kill.train, args=arguments, daemon=True)
    process.start()
    assert reached.wait(timeout=120)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def check_same(folder, expected):
    """The parameters, the optimizer's state, the weights and the history, bit by bit."""
    assert (folder / "log.csv").read_bytes() == (expected / "log.csv").read_bytes()
    trained, whole = np.load(folder / "trained.npz"), np.load(expected / "trained.npz")
    assert trained.files == whole.files
    for key in whole.files:
        np.testing.assert_array_equal(trained[key], whole[key], strict=True)


@pytest.mark.parametrize(
    ("rule", "kills"),
    [(Momentum, [(0, 1), (1, 3), (4, 0)]), (InWindows, [(2, 3)])],
    ids=["epochs", "windows"],
)
def test_killed_run_ends_bit_equal_to_an_uninterrupted_one(tmp_path, rule, kills):
    run(tmp_path / "whole", "epoch", rule)
    for epoch, batch in kills:
        run_and_kill(tmp_path / "killed", "epoch", epoch, batch, rule)
    run(tmp_path / "killed", "epoch", rule)
    check_same(tmp_path / "killed", tmp_path / "whole")
    assert np.abs(np.load(tmp_path / "whole" / "trained.npz")["velocity"]).max() > 1e-3


def test_run_saved_within_an_epoch_goes_on_as_keras_does(tmp_path):
    # With 5 batches to an epoch, the 16th is the first of epoch 3. Keras trains that epoch again
    # from its first batch, with the parameters of the backup.
    run(tmp_path / "continued", 4, stop=(3, 0))
    run_and_kill(tmp_path / "killed", 4, 3, 2)
    run(tmp_path / "killed", 4)
    check_same(tmp_path / "killed", tmp_path / "continued")


@pytest.mark.skipif(BACKEND != "torch", reason="the session on torch has another backend, too")
def test_run_goes_on_under_another_backend_and_back(tmp_path, monkeypatch):
    run_and_kill(tmp_path, "epoch", 2, 1, DynamicWeightAverage)
    with monkeypatch.context() as environment:
        environment.setenv("KERAS_BACKEND", "jax")
        run_and_kill(tmp_path, "epoch", 4, 1, DynamicWeightAverage, SPAWN)
    run(tmp_path, "epoch", DynamicWeightAverage)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(6))
    history = {key: [float(row[key]) for row in rows] for key in rows[0] if key[:4] != "val_"}
    check_run(history, DynamicWeightAverage(["easy", "hard"], temperature=0.1))
    at_each_start = history["base_loss"][::2]
    assert at_each_start == sorted(at_each_start, reverse=True)
