"""JAX's devices and processes under `keras.distribution`: four devices on one CPU in all."""

import os
import re
import shutil
import signal

import keras
import numpy as np
import pytest
import ranks
from common import BACKEND, LOSSES, X, Y, check_run, heads

from keras_dwa import CompoundLoss, DynamicWeightAverage

pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is JAX's")

IS_OLD = keras.__version__.startswith("3.10.")
several_processes = pytest.mark.skipif(
    IS_OLD, reason="Keras 3.10 takes no arrays over several processes"
)
KINDS = ["data", "model"]
# The last batch of an epoch has 4 samples, one for each device.
SAMPLES = 36


def distribution(kind):
    devices = keras.distribution.list_devices("cpu")
    if kind == "data":
        return keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout["trunk/kernel"] = (None, "model")
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
            "hard": keras.ops.mean(keras.ops.abs(y["hard"] - y_pred["hard"])),
        }
        if "offset" in y:
            # Of no gradient, so that a NaN spoils no more than the average.
            terms["hard"] += keras.ops.mean(y["offset"])
        return self.compound.combine(terms, samples=keras.ops.shape(x)[0])


def compiled_model(loss_weights, compound=None):
    """With `loss_weights`, or with a compound loss in their place."""
    inputs, outputs = heads(name="trunk")
    model = keras.Model(inputs, outputs) if compound is None else Combines(inputs, outputs)
    how = {"loss": LOSSES, "loss_weights": loss_weights} if compound is None else {}
    if compound is not None:
        model.compound = compound
    model.compile(keras.optimizers.SGD(0.05), **how)
    return model


def fit(rank, ranks, kind, compound=False, update_freq="epoch", nan=False, folder=None, kill=()):
    """Trains on this process's share of every batch; returns what came of it.

    `kind` is that of the distribution, None for none. If `nan`, one sample has a NaN, of the last
    process. The run resumes from its backup in `folder`, and the first process is killed if `kill`.
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
        if nan:
            y["offset"] = np.where(mine == 7, np.nan, 0.0)
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


def check_same(found, expected, rtol=1e-5):
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol, atol=rtol / 100, err_msg=key)


WAYS = {
    "compile": {},
    "compound": {"compound": True},
    "windows": {"update_freq": 3},
    "compound in windows": {"compound": True, "update_freq": 3},
    "windows with a NaN": {"compound": True, "update_freq": 3, "nan": True},
}


# Of those above, the ones that differ most, since processes take long.
IN_PROCESSES = [("data", "windows"), ("data", "windows with a NaN"), ("model", "compile")]


def fit_in_each_way(rank, ranks):
    return {(kind, way): fit(rank, ranks, kind, **WAYS[way]) for kind, way in IN_PROCESSES}


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory):
    return ranks.run(fit_in_each_way, 2, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:DynamicWeightAverage holds")
def test_four_devices_have_the_weights_of_one(kind, way):
    expected = fit(0, 1, None, **WAYS[way])
    check_same(fit(0, 1, kind, **WAYS[way]), expected)
    assert len(expected["windows"]) == ("windows" in way) * 8
    if way in ("compile", "compound"):
        check_run(expected, DynamicWeightAverage(["easy", "hard"], temperature=0.2))


@several_processes
@pytest.mark.parametrize(("kind", "way"), IN_PROCESSES)
@pytest.mark.filterwarnings("ignore:DynamicWeightAverage holds")
def test_two_processes_have_the_weights_of_one(kind, way, of_processes):
    expected = fit(0, 1, None, **WAYS[way])
    first, second = (of_process[kind, way] for of_process in of_processes)
    check_same(first, expected)
    check_same(second, expected)
    for key in ("factors", "windows", "easy_weight"):
        np.testing.assert_array_equal(first[key], second[key])
    assert not np.allclose(first["factors"], 1)


@several_processes
def test_killed_run_resumes_on_as_many_processes_and_on_one(tmp_path):
    whole = ranks.run(fit, 2, tmp_path / "whole", "data")
    folder = tmp_path / "killed"
    arguments = ("data", False, "epoch", False, folder)
    killed = ranks.start(fit, 2, folder, *arguments, (3, 2))
    # The other is ended by JAX, which loses the coordinator.
    assert ranks.exit_codes(killed) == [-signal.SIGKILL, -signal.SIGABRT]
    one = shutil.copytree(folder, tmp_path / "one")
    expected = {key: values[-2:] for key, values in whole[0].items() if len(values) == 5}
    expected |= {key: whole[0][key] for key in ("factors", "kernel")}
    for found in ranks.run(fit, 2, folder, *arguments):
        check_same(found, expected, rtol=0)
    check_same(fit(0, 1, "data", folder=one), expected)


COLLECTIVES = r"= (.*?) (all-(?:reduce|gather|to-all)|reduce-scatter|collective-\w+)(?:-start)?\("


@pytest.mark.skipif(IS_OLD, reason="Keras 3.10 compiles its step within `fit` alone")
@pytest.mark.parametrize("kind", KINDS)
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


def test_stateless_call_on_sharded_batches():
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    dwa = DynamicWeightAverage(["easy", "hard"])
    compound = CompoundLoss(LOSSES, dwa)
    y_pred = {name: target + 2 for name, target in Y.items()}
    sharding = NamedSharding(jax.make_mesh((4,), ("batch",)), PartitionSpec("batch"))
    y, y_pred = jax.device_put((Y, y_pred), sharding)
    loss, variables = jax.jit(compound.stateless_call)(
        [variable.value for variable in dwa.variables], y, y_pred
    )
    np.testing.assert_allclose(loss, 4 + 2, rtol=1e-6)
    np.testing.assert_allclose(variables[-1], [[160, 80, 40], [4, 2, 1]], rtol=1e-6)
