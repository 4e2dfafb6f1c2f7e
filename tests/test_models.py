"""Kinds of models, ways to feed them, and precisions."""

import keras
import numpy as np
import pytest
from common import (
    BACKEND,
    LOSSES,
    SAMPLES,
    TwoHeads,
    X,
    Y,
    check_base_loss,
    check_run,
    compiled,
    deep_elsewhere,
    dict_model,
    expected_weights,
    fit,
    floatx,
    heads,
    one_backend,
    train,
)

from keras_dwa import DynamicWeightAverage, LossWeighting


def model_of(arrange):
    """A functional model whose outputs are arranged by a function of the heads and the inputs."""
    inputs, outputs = heads()
    return keras.Model(inputs, arrange(outputs, inputs))


def built():
    model = TwoHeads()
    model(X)
    return model


def generator():
    def batches():
        while True:
            for start in range(0, SAMPLES, 8):
                batch = slice(start, start + 8)
                yield X[batch], {name: target[batch] for name, target in Y.items()}

    fit = {"x": batches(), "y": None, "steps_per_epoch": 3, "shuffle": False}
    return {**fit, "validation_split": 0, "validation_data": (X, Y), "validation_batch_size": 8}


SAMPLE_WEIGHT = {"easy": np.linspace(0, 2, SAMPLES), "hard": np.linspace(3, 0, SAMPLES)}
CASES = {
    "list outputs with named layers": lambda: {
        "model": model_of(lambda outputs, _: [outputs["hard"], outputs["easy"]]),
        "y": [Y["hard"], Y["easy"]],
    },
    "subclassed model that fit builds": lambda: {"model": TwoHeads()},
    "sample weight per output": lambda: {"sample_weight": SAMPLE_WEIGHT},
    # In a graph on TensorFlow, Keras averages an output's loss over batches, but `loss` over
    # samples, so that the one is no sum of the others there.
    "unequal batches": lambda: {"batch_size": 7, "mode": {"run_eagerly": BACKEND == "tensorflow"}},
}
MORE_CASES = {
    "dict with an output without a loss": lambda: {
        "model": model_of(lambda outputs, x: {**outputs, "more": keras.layers.Identity()(x)})
    },
    "subclassed model that is built": lambda: {"model": built()},
    "validation of every second epoch": lambda: {"epochs": 4, "validation_freq": 2},
    "generator": generator,
}


@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(make, id=case) for case, make in CASES.items()),
        *(pytest.param(make, id=case, marks=deep_elsewhere) for case, make in MORE_CASES.items()),
    ],
)
def test_any_model_fed_in_any_way_trains_by_the_weights(dwa, make):
    fit = {"model": dict_model(), "validation_split": 0.2, **make()}
    history = train(dwa=dwa, **fit)
    check_run(history, dwa)
    validated = len(history["loss"]) // fit.get("validation_freq", 1)
    assert len(history["val_loss"]) == len(history["val_base_loss"]) == validated


@one_backend
def test_only_a_model_that_was_locked_is_locked_again(dwa):
    subclassed, functional = built(), dict_model()
    for model in (subclassed, functional):
        dwa.set_model(compiled(model, dwa))
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        subclassed.another = keras.layers.Dense(1)
    functional.another = keras.metrics.Mean()
    assert functional.another in functional.metrics


def test_nested_outputs_go_by_their_path():
    def nested(outputs, x):
        return {"body": {"easy": outputs["easy"], "third": keras.layers.Dense(1)(x)}, **outputs}

    model = model_of(nested)
    dwa = DynamicWeightAverage(["body/easy", "body/third", "hard"], temperature=0.2)
    weights = dwa.loss_weights
    body = {"easy": weights["body/easy"], "third": weights["body/third"]}
    losses = {"body": {"easy": "mse", "third": "mae"}, "hard": "mae"}
    weights = {"body": body, "hard": weights["hard"]}
    compiled(model, dwa, loss=losses, loss_weights=weights)
    targets = {"body": {"easy": Y["easy"], "third": Y["easy"] ** 2}, **Y}
    check_run(fit(model, dwa, y=targets, validation_split=0.2), dwa)


@pytest.mark.parametrize(
    ("kind", "number"),
    [(dict, 0.5), (list, np.float32(0.5)), pytest.param(tuple, 2, marks=one_backend)],
)
def test_outputs_of_a_list_may_have_a_number_or_no_loss_in_dicts_and_lists(dwa, kind, number):
    """Outputs in an order that is not alphabetical."""

    def arrange(outputs, x):
        mask, more = keras.layers.Dense(1, name="mask")(x), keras.layers.Identity(name="more")(x)
        return [outputs["hard"], mask, more, outputs["easy"]]

    model = model_of(arrange)
    losses = {"hard": "mae", "mask": "mse", "more": None, "easy": "mse"}
    weights = {**dict.fromkeys(losses), **dwa.loss_weights, "mask": number}
    if kind is not dict:
        losses, weights = kind(losses.values()), kind(weights.values())
    compiled(model, dwa, loss=losses, loss_weights=weights)
    targets = [Y["hard"], Y["easy"] + 1, X, Y["easy"]]
    history = fit(model, dwa, y=targets, validation_split=0.2)

    moved = np.array([history["easy_weight"], history["hard_weight"]]).T
    np.testing.assert_allclose(moved, expected_weights(history, dwa), rtol=1e-5)
    assert abs(moved[2, 0] - 1) > 1e-3
    for prefix in ("", "val_"):
        easy, hard, mask = (np.array(history[f"{prefix}{n}_loss"]) for n in (*LOSSES, "mask"))
        total = moved[:, 0] * easy + moved[:, 1] * hard + number * mask
        np.testing.assert_allclose(history[f"{prefix}loss"], total, rtol=1e-5)
    check_base_loss(history, {**dwa.base_weights, "mask": number})


class Constant(keras.layers.Layer):
    def call(self, inputs):
        self.add_loss(0.25 + 0 * keras.ops.sum(inputs))
        return inputs


def test_regularizers_and_add_loss_stay_unweighted():
    weighting = LossWeighting({"easy": 1.0, "hard": 0.5})
    weighting.assign({"easy": 2.0})
    inputs, outputs = heads(kernel_regularizer=keras.regularizers.L2(0.1), name="trunk")
    model = keras.Model(inputs, {**outputs, "easy": Constant()(outputs["easy"])})
    compiled(model, weighting, 0.0)
    history = fit(model, weighting, epochs=1, validation_split=0.2)
    added = 0.1 * (model.get_layer("trunk").get_weights()[0] ** 2).sum() + 0.25
    for prefix in ("", "val_"):
        easy, hard = (history[f"{prefix}{name}_loss"][0] for name in LOSSES)
        loss = 2 * easy + 0.5 * hard + added
        np.testing.assert_allclose(history[f"{prefix}loss"], loss, rtol=1e-5)
    check_base_loss(history, weighting.base_weights, added)


@pytest.mark.parametrize(
    "policy", ["mixed_float16", "float64", pytest.param("mixed_bfloat16", marks=pytest.mark.deep)]
)
def test_weights_have_the_dtype_of_floatx_at_any_precision(policy):
    dtype = "float64" if policy == "float64" else "float32"
    with floatx(dtype):
        keras.config.set_dtype_policy(policy)  # Until `clear_session`, after every test.
        dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
        history = train(dict_model(), dwa, validation_split=0.2)
    check_run(history, dwa)
    assert {weight.dtype for weight in dwa.loss_weights.values()} == {dtype}
