"""What the callback adds to the logs, and who sees it."""

import csv
import itertools

import keras
import numpy as np
import pytest
from common import (
    BACKEND,
    LOSSES,
    NAMES,
    ComputeLoss,
    Lambda,
    X,
    check_run,
    compiled,
    dict_model,
    one_backend,
    train,
)

from keras_dwa import DynamicWeightAverage, LossWeighting, LossWeightScheduler, _logs
from keras_dwa._compiled import known_rest

OURS = ["easy_weight", "hard_weight", "base_loss", "val_base_loss"]


def on_tensorboard(folder, key):
    """What Keras's TensorBoard shows of a key of the logs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(f"{folder}/{'validation' if key.startswith('val_') else 'train'}")
    events.Reload()
    shown = events.Tensors(f"epoch_{key.removeprefix('val_')}")
    return [make_ndarray(event.tensor_proto).item() for event in shown]


def test_loggers_and_early_stopping_read_what_is_logged(dwa, tmp_path):
    others = [
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        # Keras knows only of `val_loss` that less is better.
        keras.callbacks.EarlyStopping("val_base_loss", mode="min", min_delta=1e9, patience=3),
    ]
    if BACKEND == "tensorflow":
        others.append(keras.callbacks.TensorBoard(tmp_path, write_graph=False))
    history = train(dict_model(), dwa, epochs=9, others=others, validation_split=0.2)
    check_run(history, dwa)
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for key in OURS:
        assert [float(row[key]) for row in rows] == history[key]
        if BACKEND == "tensorflow":
            np.testing.assert_allclose(on_tensorboard(tmp_path, key), history[key], rtol=1e-6)


@one_backend
@pytest.mark.filterwarnings("ignore:LossWeightScheduler does not know the losses")
def test_own_loop_may_give_the_logs_of_its_last_batch_as_those_of_the_epoch():
    schedule = LossWeightScheduler(NAMES, lambda step: {"hard": step}, update_freq=1)
    schedule.set_model(compiled(dict_model(), schedule))
    schedule.set_params({})
    schedule.on_train_begin()
    schedule.on_epoch_begin(0)
    logs = {"easy_loss": 1.0, "hard_loss": 1.0, "loss": 2.0}
    for batch in range(3):
        schedule.on_train_batch_begin(batch)
        schedule.on_train_batch_end(batch, logs)
    assert logs["hard_weight"] == 2.0
    schedule.on_epoch_end(0, logs)
    assert logs["hard_weight"] == 1.0


@one_backend  # Only TensorFlow uses all of this: see `test_counts.py`.
def test_rest_of_a_total_is_known_where_neither_layers_nor_steps_add_to_it():
    def rest(model, weight=0.5):
        model.compile("sgd", LOSSES, loss_weights={**weighting.loss_weights, "hard": weight})
        return known_rest(model, {"val_hard_loss": 4.0}, weighting._weights.entries, "val_")

    weighting, regularized = LossWeighting(["easy"]), dict_model(kernel_regularizer="l2")
    assert rest(dict_model()) == 2.0
    kernel = regularized.get_weights()[0]
    assert rest(regularized) == pytest.approx(2.0 + 0.01 * np.square(kernel).sum())
    assert rest(ComputeLoss(LossWeighting(NAMES))) is None
    adds = dict_model(activity_regularizer="l2")
    adds(X)
    assert rest(adds) is None
    assert rest(dict_model(), weight=keras.Variable(1.0)) is None


@one_backend
def test_base_loss_where_the_rest_is_known_and_logs_are_none_of_pythons_floats():
    logs = {"loss": np.float32(9.0), "val_loss": np.float32(9.0), "other": "text"}
    _logs.make_floats(logs)
    assert logs == {"loss": 9.0, "val_loss": 9.0, "other": "text"}
    assert type(logs["loss"]) is float
    base_weights, losses = np.array([2.0, 0.5]), np.array([1.0, 4.0])
    _logs.add_base_loss(logs, [], losses, base_weights, 0.25)
    logs |= {"val_easy_loss": 2.0, "val_hard_loss": 2.0}
    _logs.add_val_base_loss(logs, ["easy", "hard"], losses, base_weights, None, 0.5)
    assert (logs["base_loss"], logs["val_base_loss"]) == (4.25, 5.5)


def logs_of_batches(weighting, *others, async_safe=False):
    """The weight in the logs of each batch, by epoch."""
    epochs = []

    def look(batch, logs):
        epochs[-1][batch] = logs.get("hard_weight")

    last = Lambda(on_epoch_begin=lambda epoch, logs: epochs.append({}), on_train_batch_end=look)
    last.async_safe = async_safe
    train(dict_model(), weighting, others=[*others, last])
    return [[logs[batch] for batch in range(5)] for logs in epochs]


# On TensorFlow, Keras waits for each batch.
@pytest.mark.parametrize("async_safe", [False, True] if BACKEND != "tensorflow" else [False])
def test_logs_of_batches_have_the_weights_where_these_move_within_epochs(async_safe):
    schedule = LossWeightScheduler(NAMES, lambda step: {"hard": step}, update_freq=1)
    found = logs_of_batches(schedule, async_safe=async_safe)
    assert found == [[*range(5)], [*range(5, 10)], [*range(10, 15)]]


@one_backend
def test_logs_of_batches_have_the_weights_once_one_was_assigned_within_an_epoch():
    weighting, steps = LossWeighting(NAMES), itertools.count()
    assign = Lambda(
        on_train_batch_begin=lambda batch, logs: next(steps) == 8 and weighting.assign({"hard": 7})
    )
    found = logs_of_batches(weighting, assign)
    assert found == [[None] * 5, [None] * 3 + [7.0] * 2, [7.0] * 5]


@one_backend
def test_verbose_prints_the_new_weights(capsys):
    dwa = DynamicWeightAverage(NAMES, temperature=0.2, verbose=1)
    train(dict_model(), dwa, epochs=2)
    new = ", ".join(f"{name}: {weight:.4f}" for name, weight in dwa.step().items())
    assert capsys.readouterr().out == (
        "\nEpoch 1: DynamicWeightAverage setting loss weights to easy: 1.0000, hard: 1.0000.\n"
        f"\nEpoch 2: DynamicWeightAverage setting loss weights to {new}.\n"
    )
    assert "1.0000" not in new
