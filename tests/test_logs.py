"""What the callback adds to the logs, and who sees it."""

import csv

import keras
import numpy as np
import pytest
from common import BACKEND, LOSSES, X, Y, dict_model, train

from keras_dwa import DynamicWeightAverage


@pytest.fixture
def dwa():
    return DynamicWeightAverage({"easy": 3.0, "hard": 0.5}, temperature=0.2)


def fit(dwa, *others, **arguments):
    model = dict_model()
    model.compile(keras.optimizers.SGD(0.05), LOSSES, loss_weights=dwa.loss_weights)
    arguments = {"epochs": 4, "batch_size": 8, "verbose": 0, "validation_split": 0.2, **arguments}
    return model, model.fit(X, Y, callbacks=[dwa, *others], **arguments).history


def test_logged_weight_is_the_one_that_the_epoch_had(dwa):
    seen = []

    class Weights(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(float(dwa.loss_weights["easy"]))

    _, history = fit(dwa, Weights())
    assert history["easy_weight"] == seen
    assert len(set(seen)) == 3


def test_base_loss_is_the_loss_under_the_base_weights(dwa):
    model, history = fit(dwa)
    parts = {name: np.array(history[f"{name}_loss"]) for name in LOSSES}
    np.testing.assert_allclose(
        history["base_loss"], 3 * parts["easy"] + 0.5 * parts["hard"], rtol=1e-5
    )
    assert abs(history["base_loss"][3] - history["loss"][3]) > 1e-3

    model.compile("sgd", LOSSES, loss_weights={"easy": 3.0, "hard": 0.5})
    validation = {name: target[32:] for name, target in Y.items()}
    static = model.evaluate(X[32:], validation, verbose=0, return_dict=True)["loss"]
    np.testing.assert_allclose(history["val_base_loss"][3], static, rtol=1e-5)
    assert abs(history["val_base_loss"][3] - history["val_loss"][3]) > 1e-3


def test_base_loss_of_an_epoch_that_overflowed_is_as_the_loss(dwa):
    logs = {"loss": float("inf"), "easy_loss": float("inf"), "hard_loss": 1.0}
    model = dict_model()
    model.compile("sgd", LOSSES, loss_weights=dwa.loss_weights)
    dwa.set_model(model)
    dwa.on_train_begin()
    dwa.on_epoch_begin(0)
    dwa.on_train_batch_end(0)  # A loop of one's own may give no logs there.
    with pytest.warns(UserWarning, match="easy"):
        dwa.on_epoch_end(0, logs)
    assert logs["base_loss"] == float("inf")


def test_csv_logger_writes_the_weights(dwa, tmp_path):
    _, history = fit(dwa, keras.callbacks.CSVLogger(tmp_path / "log.csv"))
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for key in ("easy_weight", "hard_weight", "base_loss", "val_base_loss"):
        assert [float(row[key]) for row in rows] == history[key]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras's TensorBoard writes with TensorFlow")
def test_tensorboard_shows_the_weights(dwa, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    _, history = fit(dwa, keras.callbacks.TensorBoard(tmp_path, write_graph=False))
    for run, keys in {
        "train": {"easy_weight": "easy_weight", "base_loss": "base_loss"},
        "validation": {"base_loss": "val_base_loss"},
    }.items():
        events = EventAccumulator(str(tmp_path / run))
        events.Reload()
        for tag, key in keys.items():
            values = [
                make_ndarray(event.tensor_proto).item() for event in events.Tensors(f"epoch_{tag}")
            ]
            np.testing.assert_allclose(values, history[key], rtol=1e-6)


def test_early_stopping_monitors_the_validation_loss_under_the_base_weights(dwa):
    # Keras knows for no loss but `val_loss` that less is better.
    early_stopping = keras.callbacks.EarlyStopping("val_base_loss", mode="min", min_delta=1e9)
    _, history = fit(dwa, early_stopping, epochs=5)
    assert len(history["loss"]) == 2


def test_verbose_prints_the_new_weights(capsys):
    dwa = DynamicWeightAverage(["easy", "hard"], verbose=1)
    fit(dwa, epochs=2)
    new = ", ".join(f"{name}: {weight:.4f}" for name, weight in dwa.step().items())
    assert capsys.readouterr().out == (
        "\nEpoch 1: DynamicWeightAverage setting loss weights to easy: 1.0000, hard: 1.0000.\n"
        f"\nEpoch 2: DynamicWeightAverage setting loss weights to {new}.\n"
    )
    assert "1.0000" not in new


def test_silent_by_default(capsys):
    train(dict_model(), DynamicWeightAverage(["easy", "hard"]), epochs=1)
    assert capsys.readouterr().out == ""
