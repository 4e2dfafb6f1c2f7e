"""JAX's devices and processes under `keras.distribution`: four devices on one CPU."""

import re

import keras
import numpy as np
import pytest
import ranks
from common import BACKEND, LOSSES, NAMES, X, Y, compiled, fit, heads
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


class Combines(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        terms = {
            "easy": keras.ops.mean(keras.ops.square(y["easy"] - y_pred["easy"])),
            # The offset has no gradient, so a NaN spoils only the average.
            "hard": keras.ops.mean(keras.ops.abs(y["hard"] - y_pred["hard"]) + y["offset"]),
        }
        return self.compound.combine(terms, samples=keras.ops.shape(x)[0])


def compiled_model(dwa, how):
    """With static weights ("static"), those of `dwa` ("compile"), or a compound loss."""
    if how == "compound":
        model = Combines(*heads(name="trunk"))
        model.compound = CompoundLoss(NAMES, dwa)
        return compiled(model)
    weights = {"easy": 1.0, "hard": 2.0} if how == "static" else dwa.loss_weights
    return compiled(keras.Model(*heads(name="trunk")), loss=LOSSES, loss_weights=weights)


def train(rank, ranks, kind, how):
    """Trains on this process's share of every batch; returns the results.

    `kind` is that of the distribution, None for none. With a compound loss, one sample of the last
    process has a NaN.
    """
    keras.utils.set_random_seed(0)
    keras.distribution.set_distribution(kind and distribution(kind))
    try:
        dwa = DynamicWeightAverage(NAMES, temperature=0.2, update_freq=3)
        model = compiled_model(dwa, how)
        (kernel,) = [v for v in model.variables if v.path == "trunk/kernel"]
        assert kernel.value.sharding.is_fully_replicated == (kind != "model")
        mine = [np.arange(SAMPLES)[at : at + 8] for at in range(0, SAMPLES, 8)]
        mine = np.concatenate([np.split(batch, ranks)[rank] for batch in mine])
        y = {name: target[mine] for name, target in Y.items()}
        if how == "compound":
            y["offset"] = np.where(mine == 7, np.nan, 0.0)[:, np.newaxis]
        history = fit(model, dwa, x=X[mine], y=y, batch_size=8 // ranks, epochs=5)
        return {
            **history,
            "factors": list(dwa.factors.values()),
            "windows": [list(window.weights.values()) for window in dwa.windows],
            "kernel": keras.ops.convert_to_numpy(kernel),
        }
    finally:
        keras.distribution.set_distribution(None)


# The kind of distribution, and how the model is weighted.
CASES = [("model", "compile"), ("data", "compound")]


def train_all(rank, ranks):
    return [train(rank, ranks, *case) for case in CASES]


@pytest.mark.filterwarnings("ignore:DynamicWeightAverage holds")
def test_four_devices_in_one_process_or_two_have_the_weights_of_one_device(tmp_path):
    of_processes = ranks.run(train_all, 2, tmp_path)
    for case, one, two, other in zip(CASES, train_all(0, 1), *of_processes, strict=True):
        expected = train(0, 1, None, case[1])
        assert len(expected["windows"]) == 8
        assert not np.allclose(expected["factors"], 1)
        for found in (one, two, other):
            check_same(found, expected)
        for key in ("factors", "windows", "easy_weight"):
            np.testing.assert_array_equal(two[key], other[key])


COLLECTIVES = r"= (.*?) (all-(?:reduce|gather|to-all)|reduce-scatter|collective-\w+)(?:-start)?\("


@pytest.mark.parametrize("kind", ["data", "model"])
def test_step_communicates_nothing_more_than_with_static_weights(kind):
    import jax

    def collectives(how):
        keras.utils.set_random_seed(0)
        dwa = DynamicWeightAverage(NAMES)
        model = compiled_model(dwa, how)
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
