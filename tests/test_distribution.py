"""JAX's devices and processes under `keras.distribution`: four devices on one CPU."""

import os
import re
import shutil
import signal

import keras
import numpy as np
import pytest
import ranks
from common import BACKEND, LOSSES, X, Y, heads
from ranks import check_same

from keras_dwa import CompoundLoss, DynamicWeightAverage

pytestmark = [
    pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is JAX's"),
    pytest.mark.deep,
]

# The last batch of an epoch has 4 samples, one for each device.
SAMPLES = 36


def distribution(kind):
    devices = keras.distribution.list_devices("cpu")
    if kind == "data":
        return keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout["trunk/kernel"] = (None, "model")
    # This pattern also matches our variables.
    layout["record|.*_weight"] = (None, "model")
    return keras.distribution.ModelParallel(
        layout_map=layout, batch_dim_name="batch", auto_shard_dataset=False
    )


class Kill(keras.callbacks.Callback):
    def __init__(self, epoch, batch):
        super().__init__()
        self.at = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class Combines(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        terms = {
            "easy": keras.ops.mean(keras.ops.square(y["easy"] - y_pred["easy"])),
            # The offset has no gradient, so a NaN spoils only the average.
            "hard": keras.ops.mean(keras.ops.abs(y["hard"] - y_pred["hard"]) + y["offset"]),
        }
        return self.compound.combine(terms, samples=keras.ops.shape(x)[0])


def compiled_model(loss_weights, compound=None):
    """With `loss_weights`, or with a compound loss instead."""
    model = (Combines if compound else keras.Model)(*heads(name="trunk"))
    if compound:
        model.compound = compound
        model.compile(keras.optimizers.SGD(0.05))
    else:
        model.compile(keras.optimizers.SGD(0.05), LOSSES, loss_weights=loss_weights)
    return model


def fit(rank, ranks, kind, compound=False, update_freq="epoch", folder=None, kill=()):
    """Trains on this process's share of every batch; returns the results.

    `kind` is that of the distribution, None for none. With a compound loss, one sample of the last
    process has a NaN. The run resumes from its backup in `folder`, and the first process is killed
    if `kill`.
    """
    keras.utils.set_random_seed(0)
    keras.distribution.set_distribution(kind and distribution(kind))
    try:
        dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2, update_freq=update_freq)
        combined = CompoundLoss(["easy", "hard"], dwa) if compound else None
        model = compiled_model(dwa.loss_weights, combined)
        (kernel,) = [v for v in model.variables if v.path == "trunk/kernel"]
        assert kernel.value.sharding.is_fully_replicated == (kind != "model")
        mine = [np.arange(SAMPLES)[at : at + 8] for at in range(0, SAMPLES, 8)]
        mine = np.concatenate([np.split(batch, ranks)[rank] for batch in mine])
        y = {name: target[mine] for name, target in Y.items()}
        if compound:
            y["offset"] = np.where(mine == 7, np.nan, 0.0)[:, np.newaxis]
        callbacks = [dwa]
        if folder:
            callbacks += [keras.callbacks.BackupAndRestore(folder / f"backup{rank}")]
        if kill and rank == 0:
            callbacks += [Kill(*kill)]
        arguments = {"batch_size": 8 // ranks, "shuffle": False, "epochs": 5, "verbose": 0}
        history = model.fit(X[mine], y, callbacks=callbacks, **arguments).history
        return {
            **history,
            "factors": list(dwa.factors.values()),
            "windows": [list(window.weights.values()) for window in dwa.windows],
            "kernel": keras.ops.convert_to_numpy(kernel),
        }
    finally:
        keras.distribution.set_distribution(None)


# The kind of distribution, whether there is a compound loss, and `update_freq`.
CASES = [("model", False, "epoch"), ("data", False, 3), ("data", True, 3)]


def fit_all(rank, ranks):
    return {case: fit(rank, ranks, *case) for case in CASES}


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory):
    return ranks.run(fit_all, 2, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:DynamicWeightAverage holds")
def test_four_devices_have_the_weights_of_one(case):
    expected = fit(0, 1, None, *case[1:])
    check_same(fit(0, 1, *case), expected)
    assert len(expected["windows"]) == (8 if 3 in case else 0)
    assert not np.allclose(expected["factors"], 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:DynamicWeightAverage holds")
def test_two_processes_have_the_weights_of_one(case, of_processes):
    expected = fit(0, 1, None, *case[1:])
    first, second = (of_process[case] for of_process in of_processes)
    check_same(first, expected)
    check_same(second, expected)
    for key in ("factors", "windows", "easy_weight"):
        np.testing.assert_array_equal(first[key], second[key])


def test_killed_run_resumes_on_as_many_processes_and_on_one(tmp_path):
    whole = ranks.run(fit, 2, tmp_path / "whole", "data")
    folder = tmp_path / "killed"
    arguments = ("data", False, "epoch", folder)
    killed = ranks.start(fit, 2, folder, *arguments, (3, 2))
    # JAX ends the other process, because it loses the coordinator.
    assert ranks.exit_codes(killed) == [-signal.SIGKILL, -signal.SIGABRT]
    one = shutil.copytree(folder, tmp_path / "one")
    expected = {key: values[-2:] for key, values in whole[0].items() if len(values) == 5}
    expected |= {key: whole[0][key] for key in ("factors", "kernel")}
    for found in ranks.run(fit, 2, folder, *arguments):
        check_same(found, expected, rtol=0)
    check_same(fit(0, 1, "data", folder=one), expected)


COLLECTIVES = r"= (.*?) (all-(?:reduce|gather|to-all)|reduce-scatter|collective-\w+)(?:-start)?\("


@pytest.mark.parametrize("kind", ["data", "model"])
def test_step_communicates_nothing_more_than_with_static_weights(kind):
    import jax

    def collectives(how):
        keras.utils.set_random_seed(0)
        dwa = DynamicWeightAverage(["easy", "hard"])
        compound = CompoundLoss(["easy", "hard"], dwa) if how == "compound" else None
        static = {"easy": 1.0, "hard": 2.0}
        model = compiled_model(static if how == "static" else dwa.loss_weights, compound)
        if how != "static":
            dwa.set_model(model)
        y = {name: target[:8] for name, target in Y.items()}
        if how == "compound":
            y["offset"] = np.zeros((8, 1), "float32")
        layout = keras.distribution.distribution().get_data_layout((8, 4)).backend_layout
        data = jax.device_put((X[:8], y), layout)
        model.evaluate(X[:8], y, verbose=0)  # Makes all variables.
        model.optimizer.build(model.trainable_variables)
        of_model = model.trainable_variables, model.non_trainable_variables
        variables = *of_model, model.optimizer.variables, model.metrics_variables
        state = tuple([variable.value for variable in group] for group in variables)
        hlo = jax.jit(model.train_step).lower(state, data).compile().as_text()
        found = re.findall(COLLECTIVES, hlo)
        return sorted((name, *sorted(re.findall(r"\w+\[.*?\]", shapes))) for shapes, name in found)

    with distribution(kind).scope():
        static = collectives("static")
        assert static
        assert collectives("compile") == collectives("compound") == static
