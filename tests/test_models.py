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
    fit,
    floatx,
    heads,
    one_backend,
    train,
)

from keras_dwa import DynamicWeightAverage


def model_of(arrange):
    """A functional model whose outputs are arranged by a function of the heads and the inputs."""
    inputs, outputs = heads()
    return keras.Model(inputs, arrange(outputs, inputs))


SAMPLE_WEIGHT = {"easy": np.linspace(0, 2, SAMPLES), "hard": np.linspace(3, 0, SAMPLES)}
CASES = {
    "list outputs with named layers, validated every second epoch": lambda: {
        "model": model_of(lambda outputs, _: [outputs["hard"], outputs["easy"]]),
        "y": [Y["hard"], Y["easy"]],
        "epochs": 4,
        "validation_freq": 2,
    },
    "subclassed model that fit builds, with sample weights per output": lambda: {
        "model": TwoHeads(),
        "sample_weight": SAMPLE_WEIGHT,
    },
    # In a graph on TensorFlow, Keras averages an output's loss over batches, but `loss` over
    # samples, so that the one is no sum of the others there.
    "unequal batches": lambda: {"batch_size": 7, "mode": {"run_eagerly": BACKEND == "tensorflow"}},
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_any_model_fed_in_any_way_trains_by_the_weights(dwa, make):
    fit = {"model": dict_model(), "validation_split": 0.2, **make()}
    history = train(dwa=dwa, **fit)
    check_run(history, dwa)
    validated = len(history["loss"]) // fit.get("validation_freq", 1)
    assert len(history["val_loss"]) == len(history["val_base_loss"]) == validated


@one_backend
def test_only_a_model_that_was_locked_is_locked_again(dwa):
    subclassed, functional = TwoHeads(), dict_model()
    subclassed(X)
    for model in (subclassed, functional):
        dwa.set_model(compiled(model, dwa))
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        subclassed.another = keras.layers.Dense(1)
    functional.another = keras.metrics.Mean()
    assert functional.another in functional.metrics


@deep_elsewhere
def test_nested_outputs_go_by_their_path():
    def nested(easy, hard):
        return {"body": {"easy": easy}, "hard": hard}

    dwa = DynamicWeightAverage(["body/easy", "hard"], temperature=0.2)
    model = model_of(lambda outputs, _: nested(**outputs))
    compiled(model, loss=nested(**LOSSES), loss_weights=nested(*dwa.loss_weights.values()))
    check_run(fit(model, dwa, y=nested(**Y), validation_split=0.2), dwa)


@pytest.mark.parametrize(
    ("kind", "number"), [(dict, 0.5), pytest.param(list, np.float32(0.5), marks=deep_elsewhere)]
)
def test_outputs_of_a_list_may_have_a_number_or_no_loss_in_dicts_and_lists(dwa, kind, number):
    """Outputs in an order that is not alphabetical."""

    def arrange(outputs, x):
        mask, more = keras.layers.Dense(1, name="mask")(x), keras.layers.Identity(name="more")(x)
        return [outputs["hard"], mask, more, outputs["easy"]]

    losses = {"hard": "mae", "mask": "mse", "more": None, "easy": "mse"}
    weights = {**dict.fromkeys(losses), **dwa.loss_weights, "mask": number}
    if kind is list:
        losses, weights = list(losses.values()), list(weights.values())
    model = compiled(model_of(arrange), loss=losses, loss_weights=weights)
    targets = [Y["hard"], Y["easy"] + 1, X, Y["easy"]]
    history = fit(model, dwa, y=targets, validation_split=0.2)
    assert abs(history["easy_weight"][2] - 1) > 1e-3
    for prefix in ("", "val_"):
        total = number * np.array(history[f"{prefix}mask_loss"])
        for name in LOSSES:
            total += np.multiply(history[f"{name}_weight"], history[f"{prefix}{name}_loss"])
        np.testing.assert_allclose(history[f"{prefix}loss"], total, rtol=1e-5)
    check_base_loss(history, {**dwa.base_weights, "mask": number})


@pytest.mark.parametrize("policy", ["mixed_float16", "float64"])
def test_weights_have_the_dtype_of_floatx_at_any_precision(policy):
    dtype = "float64" if policy == "float64" else "float32"
    with floatx(dtype):
        keras.config.set_dtype_policy(policy)  # Until `clear_session`, after every test.
        dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
        history = train(dict_model(), dwa, validation_split=0.2)
    check_run(history, dwa)
    assert {weight.dtype for weight in dwa.loss_weights.values()} == {dtype}
