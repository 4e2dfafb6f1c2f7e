"""Real processes, killed by SIGKILL within an epoch and started again."""

import multiprocessing
import signal
from functools import partial

import numpy as np
import pytest
import run_to_kill
from common import BACKEND, check_run, deep_elsewhere
from processes import FORK, succeeds

from keras_dwa import DynamicWeightAverage


def run(folder, **how):
    assert succeeds(partial(run_to_kill.train, folder, **how))


def run_and_kill(folder, epoch, batch, context=FORK, **how):
    reached = context.Event()
    target = partial(run_to_kill.train, folder, stop=(epoch, batch, reached), **how)
    process = context.Process(target=target, daemon=True)
    process.start()
    assert reached.wait(timeout=120)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def history(folder):
    table = np.genfromtxt(folder / "log.csv", delimiter=",", names=True)
    return {key: table[key].tolist() for key in table.dtype.names if key[:4] != "val_"}


def check_weights(folder):
    """The weights follow the formula, for the losses that all processes logged."""
    assert history(folder)["epoch"] == list(range(6))
    check_run(history(folder), DynamicWeightAverage(["easy", "hard"], temperature=0.1))


@deep_elsewhere
@pytest.mark.parametrize(
    ("update_freq", "kills"),
    [
        ("epoch", [(3, 1)]),
        pytest.param("epoch", [(0, 1), (1, 3), (4, 0)], marks=pytest.mark.deep),
        pytest.param(7, [(2, 3)], marks=pytest.mark.deep),
    ],
)
def test_killed_run_ends_bit_equal_to_an_uninterrupted_one(tmp_path, update_freq, kills):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, update_freq=update_freq)
    for epoch, batch in kills:
        run_and_kill(killed, epoch, batch, update_freq=update_freq)
    run(killed, update_freq=update_freq)
    assert (killed / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    assert abs(history(killed)["easy_weight"][3] - 1) > 1e-3
    # Parameters, the optimizer's state, the weights, and the losses that moved them.
    ours, theirs = (dict(np.load(folder / "trained.npz")) for folder in (killed, whole))
    np.testing.assert_equal(ours, theirs)


@pytest.mark.deep
def test_epoch_that_a_backup_within_it_repeats_has_the_right_weights(tmp_path):
    # With 5 batches to an epoch, the 16th is the first of epoch 3.
    run_and_kill(tmp_path, 3, 2, save_freq=4)
    run(tmp_path, save_freq=4)
    check_weights(tmp_path)


@pytest.mark.deep
@pytest.mark.skipif(BACKEND != "torch", reason="only the environment for torch has two backends")
def test_run_continues_under_another_backend_and_back(tmp_path, monkeypatch):
    run_and_kill(tmp_path, 2, 1)
    with monkeypatch.context() as environment:
        environment.setenv("KERAS_BACKEND", "jax")
        run_and_kill(tmp_path, 4, 1, multiprocessing.get_context("spawn"))
    run(tmp_path)
    check_weights(tmp_path)
    at_each_start = history(tmp_path)["base_loss"][::2]
    assert at_each_start == sorted(at_each_start, reverse=True)
