"""Real processes, killed by SIGKILL within an epoch and started again."""

import multiprocessing
import signal

import numpy as np
import pytest
import run_to_kill
from common import BACKEND, NAMES, check_run, deep_elsewhere
from processes import FORK

from keras_dwa import DynamicWeightAverage


def run(folder, kill_at=None, save_freq="epoch", context=FORK):
    """Trains in a process; returns the history, which all processes of this folder appended to."""
    arguments = (folder, save_freq, kill_at)
    process = context.Process(target=run_to_kill.train, args=arguments, daemon=True)
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if kill_at else 0)
    table = np.genfromtxt(folder / "log.csv", delimiter=",", names=True)
    return {key: table[key] for key in table.dtype.names if key[:4] != "val_"}


def check_weights(history):
    assert history["epoch"].tolist() == list(range(6))
    check_run(history, DynamicWeightAverage(NAMES, temperature=0.1))


@deep_elsewhere
def test_killed_run_ends_bit_equal_to_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole)
    run(killed, kill_at=(3, 1))
    assert abs(run(killed)["easy_weight"][3] - 1) > 1e-3
    assert (killed / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    # Parameters, the optimizer's state, the weights, and the losses that moved them.
    ours, theirs = (dict(np.load(folder / "trained.npz")) for folder in (killed, whole))
    np.testing.assert_equal(ours, theirs)


@pytest.mark.deep
def test_epoch_that_a_backup_within_it_repeats_has_the_right_weights(tmp_path):
    # With 5 batches to an epoch, the 16th is the first of epoch 3.
    run(tmp_path, kill_at=(3, 2), save_freq=4)
    check_weights(run(tmp_path, save_freq=4))


@pytest.mark.deep
@pytest.mark.skipif(BACKEND != "torch", reason="only the environment for torch has two backends")
def test_run_continues_under_another_backend_and_back(tmp_path, monkeypatch):
    run(tmp_path, kill_at=(2, 1))
    with monkeypatch.context() as environment:
        environment.setenv("KERAS_BACKEND", "jax")
        run(tmp_path, kill_at=(4, 1), context=multiprocessing.get_context("spawn"))
    history = run(tmp_path)
    check_weights(history)
    at_each_start = history["base_loss"][::2]
    assert (np.diff(at_each_start) < 0).all()
