"""Several losses on one output: `compile(loss=compound)`."""

import keras
import numpy as np
import pytest
from common import X, Y, check_run, one_backend

from keras_dwa import CompoundLoss, DynamicWeightAverage

NAMES = ["mse", "mae"]
in_both_modes = pytest.mark.parametrize(
    "eager", [False, pytest.param(True, marks=pytest.mark.deep)]
)
SAMPLE_WEIGHT = np.linspace(0.5, 2.0, len(X), dtype="float32")


def one_output():
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(inputs))


def compiled(model, loss, run_eagerly=False):
    model.compile(keras.optimizers.SGD(0.05), loss=loss, run_eagerly=run_eagerly)
    return model


def new_compound():
    dwa = DynamicWeightAverage({"mse": 2.0, "mae": 0.5}, temperature=0.2)
    return CompoundLoss({name: name for name in NAMES}, dwa)


def fit(model, *callbacks, epochs=3):
    arguments = {"sample_weight": SAMPLE_WEIGHT, "shuffle": False, "verbose": 0}
    arguments |= {"validation_data": (X, Y["hard"], SAMPLE_WEIGHT)}
    data = {"batch_size": 16, "epochs": epochs, **arguments}
    return model.fit(X, Y["hard"], callbacks=list(callbacks), **data).history


@in_both_modes
def test_loss_is_the_weighted_sum_of_the_logged_losses_whose_weights_move(eager):
    compound = new_compound()
    model = compiled(one_output(), compound, run_eagerly=eager)
    model.evaluate(X, Y["hard"], verbose=0)  # Before the model knows the weighting.
    check_run(fit(model, compound.weighting, epochs=4), compound.weighting)


@in_both_modes
def test_loss_that_is_off_leaves_training_to_the_other(eager):
    compound = new_compound()
    model = compiled(one_output(), compound, run_eagerly=eager)
    alone = compiled(keras.models.clone_model(model), "mse")
    alone.set_weights(model.get_weights())
    compound.weighting.assign({"mse": 0.5, "mae": 0.0})
    weighted = {"callbacks": [compound.weighting], "epochs": 1}
    for each, arguments in ((model, weighted), (alone, {"epochs": 1})):
        each.fit(X, Y["hard"], 16, shuffle=False, verbose=0, **arguments)
    for ours, theirs in zip(model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_masks_and_sample_weights_are_those_of_compile():
    tokens = np.arange(len(X) * 5).reshape(-1, 5) % 7  # 0 is masked.
    embedding = keras.layers.Embedding(7, 3, mask_zero=True)
    model = keras.Sequential([keras.Input((5,), dtype="int32"), embedding, keras.layers.Dense(2)])
    targets = np.sin([tokens] * 2).transpose(1, 2, 0)
    sample_weight = SAMPLE_WEIGHT[:, None] * np.ones(5, "float32")

    def evaluated(loss):
        compiled(model, loss)
        return model.evaluate(tokens, targets, 8, sample_weight=sample_weight, verbose=0)

    expected = 2.0 * evaluated("mse") + 0.5 * evaluated("mae")
    np.testing.assert_allclose(evaluated(new_compound()), expected, rtol=1e-5)


def test_saved_model_goes_on_as_the_one_in_memory(tmp_path):
    compound = new_compound()
    model = compiled(one_output(), compound)
    fit(model, compound.weighting)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    losses = [each.evaluate(X, Y["hard"], verbose=0) for each in (model, loaded)]
    assert np.ravel(losses[1])[0] == pytest.approx(np.ravel(losses[0])[0], rel=1e-6)
    histories = [fit(each, each.loss.weighting) for each in (model, loaded)]
    assert histories[0]["mae_weight"] != [0.5] * 3
    for key in histories[0]:
        np.testing.assert_allclose(histories[1][key], histories[0][key], rtol=1e-6)


@one_backend
def test_number_beside_it_weights_another_output_and_base_loss_is_right():
    inputs = keras.Input((4,))
    outputs = {name: keras.layers.Dense(2, name=name)(inputs) for name in ("image", "other")}
    model, compound = keras.Model(inputs, outputs), new_compound()
    loss_weights = {"image": 1.0, "other": 0.5}
    model.compile("sgd", {"image": compound, "other": "mse"}, loss_weights=loss_weights)
    targets = dict.fromkeys(outputs, Y["hard"])
    callbacks = [compound.weighting]
    history = model.fit(X, targets, 8, epochs=4, verbose=0, callbacks=callbacks).history
    logs = {key: np.array(values) for key, values in history.items()}
    other = 0.5 * logs["other_loss"]
    total = logs["mse_weight"] * logs["mse_loss"] + logs["mae_weight"] * logs["mae_loss"] + other
    np.testing.assert_allclose(logs["loss"], total, rtol=1e-5)
    base_loss = 2.0 * logs["mse_loss"] + 0.5 * logs["mae_loss"] + other
    np.testing.assert_allclose(logs["base_loss"], base_loss, rtol=1e-5)
    assert logs["mse_weight"][3] != 2.0


def test_model_that_is_compiled_without_it_again_logs_nothing_of_it():
    compound = new_compound()
    model = compiled(one_output(), compound)
    fit(model, compound.weighting, epochs=1)
    compiled(model, "mse")
    assert set(model.evaluate(X, Y["hard"], verbose=0, return_dict=True)) == {"loss"}
    assert set(model.fit(X, Y["hard"], verbose=0).history) == {"loss"}
