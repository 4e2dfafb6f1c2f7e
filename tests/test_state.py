"""The two epochs that DWA remembers: when they go on, when they start afresh, what they survive."""

import contextlib
import copy
import functools
import gc
import pickle
import tracemalloc
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from common import (
    BACKEND,
    LOSSES,
    TwoHeads,
    X,
    Y,
    check_run,
    dict_model,
    joined,
    one_backend,
    our_messages,
    train,
)

import keras_dwa
from keras_dwa import CompoundLoss, DynamicWeightAverage, dwa_weights

FIT = {"batch_size": 8, "verbose": 0}


@pytest.fixture
def dwa():
    return DynamicWeightAverage(["easy", "hard"], temperature=0.2)


def compiled_model(dwa):
    model = dict_model()
    model.compile(keras.optimizers.SGD(0.05), LOSSES, loss_weights=dwa.loss_weights)
    return model


def test_next_fit_on_the_same_model_continues_the_history(dwa):
    model = dict_model()
    first = train(model, dwa, epochs=1)

    def stop(batch, logs):
        model.stop_training = batch == 2

    # Neither compiled anew, nor trained to the end of its first epoch.
    callbacks = [dwa, keras.callbacks.LambdaCallback(on_train_batch_end=stop)]
    second = model.fit(X, Y, epochs=2, callbacks=callbacks, **FIT).history
    assert len(second["loss"]) == 1
    check_run(joined(first, second, train(model, dwa)), dwa)


def test_every_other_model_starts_afresh_and_so_does_a_reset(dwa, tmp_path):
    for easy in (4.0, 1.0):
        dwa.step({"easy": easy, "hard": 1.0})
    model = dict_model()
    model.compile("sgd", LOSSES)
    with pytest.raises(ValueError, match=r"loss_weights=weighting\.loss_weights"):
        model.fit(X, Y, verbose=0, callbacks=[dwa])
    check_run(train(model, dwa), dwa)
    check_run(train(dict_model(), dwa), dwa)
    with pytest.warns(UserWarning, match="comes back to a model"):
        check_run(train(model, dwa), dwa)
    model.save_weights(tmp_path / "w.weights.h5")
    model.load_weights(tmp_path / "w.weights.h5")
    model = dict_model()
    check_run(train(model, dwa), dwa)
    dwa.reset()
    check_run(train(model, dwa), dwa)


def test_evaluate_does_no_harm_and_uses_the_current_weights(dwa):
    model = compiled_model(dwa)
    model.evaluate(X, Y, **FIT)
    check_run(model.fit(X, Y, epochs=3, validation_split=0.2, callbacks=[dwa], **FIT).history, dwa)
    results = model.evaluate(X, Y, return_dict=True, **FIT)
    weights = {name: float(weight) for name, weight in dwa.loss_weights.items()}
    expected = sum(weights[name] * results[f"{name}_loss"] for name in weights)
    np.testing.assert_allclose(results["loss"], expected, rtol=1e-5)
    assert abs(weights["easy"] - 1) > 1e-3


def test_callbacks_in_turn_on_one_model_each_start_afresh_and_leave_nothing_behind(dwa):
    model = dict_model()
    variables = []
    for callback in (dwa, DynamicWeightAverage(["easy", "hard"], temperature=0.1), dwa):
        check_run(train(model, callback), callback)
        variables.append(len(model.metrics_variables))
    assert len(set(variables)) == 1


def test_step_moves_the_weights_of_train_on_batch(dwa):
    model = compiled_model(dwa)
    dwa.set_model(model)
    for _ in range(4):
        weights = dwa.step()
        model.reset_metrics()  # As Keras 3.10 does not yet.
        logs = model.train_on_batch(X, Y, return_dict=True)
        weighted = sum(weights[name] * logs[f"{name}_loss"] for name in weights)
        np.testing.assert_allclose(logs["loss"], weighted, rtol=1e-5)
        dwa.step({name: logs[f"{name}_loss"] for name in weights})
    assert abs(weights["easy"] - 1) > 1e-3


def test_weights_are_scalars_that_nothing_trains_or_rounds():
    dwa = DynamicWeightAverage({"heads/easy": 1.0001})
    (weight,) = dwa.loss_weights.values()
    assert (weight.name, weight.shape, weight.trainable) == ("heads.easy_weight", (), False)
    assert [variable.trainable for variable in dwa.variables] == [False]

    class Scale(keras.layers.Layer):
        def call(self, inputs):
            assert weight.dtype == "float32"
            return keras.ops.convert_to_tensor(weight)

    # In a layer of half precision, Keras would round other variables to 1.0.
    scale = keras.ops.convert_to_numpy(Scale(dtype="mixed_float16")(X))
    assert (scale.dtype, scale) == ("float32", np.float32(1.0001))


@one_backend
def test_model_keeps_its_own_weights_and_summary_and_a_readable_state_tree(dwa, capsys):
    model = dict_model()
    model.compile("sgd", LOSSES)
    model.summary()
    summary, before = capsys.readouterr().out, [v.path for v in model.weights]
    train(model, dwa, epochs=1)
    model.summary()
    # The optimizer's variables, which `summary` counts once it is built, apart.
    assert capsys.readouterr().out.splitlines()[:10] == summary.splitlines()[:10]
    assert [v.path for v in model.weights] == before
    assert "loss_weights" in str(model.get_state_tree()["metrics_variables"])


@one_backend
def test_warnings_name_the_line_that_they_are_about(dwa):
    first, second = compiled_model(dwa), compiled_model(dwa)
    dwa.set_model(first)
    dwa.set_model(second)
    with pytest.warns(UserWarning, match="comes back") as of_model:
        dwa.set_model(first)
    with pytest.warns(UserWarning, match="not finite") as of_loss:
        dwa.step({"easy": float("nan"), "hard": 1.0})
    ours = [warning for warning in [*of_model, *of_loss] if our_messages([warning])]
    assert [warning.filename for warning in ours] == [__file__] * 2


def test_copy_is_the_original_and_a_pickled_callback_goes_on_without_it():
    dwa = DynamicWeightAverage({"easy": 3.0, "hard": 0.5}, temperature=0.2, verbose=1)
    train(dict_model(), dwa)
    moved = dwa.step()
    assert copy.copy(dwa) is copy.deepcopy([dwa])[0] is dwa
    unpickled = pickle.loads(pickle.dumps(dwa))
    assert (repr(unpickled), unpickled.verbose) == (repr(dwa), 1)
    assert unpickled.step() == moved
    losses = {"easy": 0.1, "hard": 0.7}
    expected = unpickled.step(losses)
    assert expected != moved
    assert dwa.step() == moved
    assert dwa.step(losses) == expected
    first = train(dict_model(), unpickled, epochs=1)
    assert {name: first[f"{name}_weight"][0] for name in expected} == expected
    check_run(train(dict_model(), unpickled), unpickled)
    assert dwa.step() == expected


def test_pickle_and_reset_within_an_epoch_have_its_weights_and_reach_the_next_step(dwa):
    model = dict_model()
    train(model, dwa)
    moved, base, seen, had = dwa.step(), {"easy": 1.0, "hard": 1.0}, [], []

    class PickleAndReset(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(pickle.loads(pickle.dumps(dwa)).step())
            had.append(float(dwa.loss_weights["easy"]))
            if batch == 1:
                dwa.reset()

    model.fit(X, Y, callbacks=[dwa, PickleAndReset()], **FIT)
    assert seen == [moved] * 2 + [base] * 3
    assert had == [weights["easy"] for weights in seen]


def test_step_moves_the_weights_by_the_averages_given_of_any_kind(dwa):
    kinds = [int, np.float32, np.array, keras.ops.convert_to_tensor]
    kinds += [functools.partial(keras.ops.cast, dtype=dtype) for dtype in ("bfloat16", "float16")]
    # Beyond float32; and on torch, the value of a trainable variable has a gradient.
    kinds += [(1e300).__mul__, (1e-300).__mul__, lambda value: keras.Variable(value).value]
    for kind in kinds:
        dwa.reset()
        first = dwa.step({"easy": kind(2.0), "hard": kind(4.0)})
        assert first == {"easy": 1.0, "hard": 1.0}
        weights = dwa.step({"hard": kind(3.0), "easy": kind(1.0)})
        expected = dwa_weights([1.0, 3.0], [2.0, 4.0], 0.2)
        np.testing.assert_allclose([weights["easy"], weights["hard"]], expected, rtol=1e-6)


def test_steps_keep_nothing_behind(dwa):
    package = tracemalloc.Filter(True, str(Path(keras_dwa.__file__).parent / "*"))

    def allocated():
        gc.collect()
        snapshot = tracemalloc.take_snapshot().filter_traces([package])
        return sum(statistic.size for statistic in snapshot.statistics("filename"))

    tracemalloc.start()
    try:
        sizes = []
        for epoch in range(200):
            if epoch in (20, 199):
                sizes.append(allocated())
            dwa.step({"easy": 2.0 + np.sin(epoch), "hard": 1.0})
    finally:
        tracemalloc.stop()
    assert sizes[1] < sizes[0] + 1000


def weighted_sum(weights, y_pred):
    mse = np.mean((Y["easy"] - y_pred["easy"]) ** 2)
    return weights["easy"] * mse + weights["hard"] * np.mean(np.abs(Y["hard"] - y_pred["hard"]))


def by_set_model(dwa):
    model = compiled_model(dwa)
    dwa.set_model(model)
    return model


def by_attribute(dwa):
    model = dict_model()
    model.compound = CompoundLoss(LOSSES, dwa)
    model.compile(keras.optimizers.SGD(0.05), LOSSES, loss_weights=dwa.loss_weights)
    return model


def by_compute_loss(dwa):
    class Combined(TwoHeads):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return compound(y, y_pred)

    compound, model = CompoundLoss(LOSSES, dwa), Combined()
    model.compile(keras.optimizers.SGD(0.05))
    return model


@pytest.mark.parametrize("make", [by_set_model, by_attribute, compiled_model, by_compute_loss])
def test_step_that_does_not_reach_a_compiled_step_warns_once(dwa, make):
    model = make(dwa)
    reaches = make in (by_set_model, by_attribute) or BACKEND != "jax"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for easy in (1.0, 1.0, 3.0):
            model.train_on_batch(X, Y)
            weights = dwa.step({"easy": easy, "hard": 1.0})
        expected = weighted_sum(weights, model.predict(X, verbose=0))
        model.reset_metrics()
        logs = model.train_on_batch(X, Y, return_dict=True)
    assert np.isclose(logs["loss"], expected, rtol=1e-4) == reaches
    warned = [message for message in our_messages(caught) if "weighting.set_model" in message]
    assert len(warned) == (not reaches)


def test_step_within_a_fit_that_was_not_given_the_callback_is_warned_of_on_jax(dwa):
    model = compiled_model(dwa)
    step = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: dwa.step({name: logs[f"{name}_loss"] for name in Y})
    )
    warns = pytest.warns(UserWarning, match="pass the callback to `fit`")
    with warns if BACKEND == "jax" else contextlib.nullcontext():
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[step])
