"""Several losses on one output: `compile(loss=compound)`."""

import keras
import numpy as np
import pytest
from common import X, Y, check_base_loss, check_run, compiled, one_backend
from common import fit as fit_model

from keras_dwa import CompoundLoss, DynamicWeightAverage

NAMES = ["mse", "mae"]
SAMPLE_WEIGHT = np.linspace(0.5, 2.0, len(X), dtype="float32")


def one_output():
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(inputs))


def new_compound():
    dwa = DynamicWeightAverage({"mse": 2.0, "mae": 0.5}, temperature=0.2)
    return CompoundLoss({name: name for name in NAMES}, dwa)


def fit(model, *callbacks, y=Y["hard"], **arguments):
    arguments |= {"sample_weight": SAMPLE_WEIGHT, "validation_data": (X, y, SAMPLE_WEIGHT)}
    return fit_model(model, *callbacks, y=y, **arguments)


@pytest.mark.parametrize("eager", [False, True])
def test_loss_is_the_weighted_sum_of_the_logged_losses_whose_weights_move(eager):
    compound = new_compound()
    model = compiled(one_output(), loss=compound, run_eagerly=eager)
    model.evaluate(X, Y["hard"], verbose=0)  # Before the model knows the weighting.
    check_run(fit(model, compound.weighting, epochs=4), compound.weighting)


@one_backend
def test_saved_model_continues_as_the_one_in_memory(tmp_path):
    compound = new_compound()
    model = compiled(one_output(), loss=compound)
    fit(model, compound.weighting)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    histories = [fit(each, each.loss.weighting) for each in (model, loaded)]
    assert histories[0]["mae_weight"] != [0.5] * 3
    for key in histories[0]:
        np.testing.assert_allclose(histories[1][key], histories[0][key], rtol=1e-6)


@one_backend
def test_number_beside_it_weights_another_output_and_base_loss_is_right():
    inputs = keras.Input((4,))
    outputs = {name: keras.layers.Dense(2, name=name)(inputs) for name in ("image", "other")}
    model, compound = keras.Model(inputs, outputs), new_compound()
    losses, weights = {"image": compound, "other": "mse"}, {"image": 1.0, "other": 0.5}
    compiled(model, loss=losses, loss_weights=weights)
    y = dict.fromkeys(outputs, Y["hard"])
    history = fit_model(model, compound.weighting, y=y)
    check_base_loss(history, {"mse": 2.0, "mae": 0.5, "other": 0.5})
    assert history["mse_weight"][2] != 2.0


@one_backend
def test_weight_of_its_own_other_than_1_is_refused():
    compound = new_compound()
    with pytest.raises(ValueError, match=r"must be 1. Found `loss_weights=\[2.0\]`"):
        fit(compiled(one_output(), loss=compound, loss_weights=[2.0]), compound.weighting)


def test_model_that_is_compiled_without_it_again_logs_nothing_of_it():
    compound = new_compound()
    model = compiled(one_output(), loss=compound)
    fit(model, compound.weighting, epochs=1)
    compiled(model, loss="mse")
    assert set(model.evaluate(X, Y["hard"], verbose=0, return_dict=True)) == {"loss"}
    assert set(model.fit(X, Y["hard"], verbose=0).history) == {"loss"}
