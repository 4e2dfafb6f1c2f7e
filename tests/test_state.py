"""The two epochs that DWA remembers: when they go on, when they start afresh, what they survive."""

import copy
import gc
import pickle
import tracemalloc
from pathlib import Path

import cloudpickle
import keras
import numpy as np
import pytest
from common import LOSSES, X, Y, check_run, dict_model, joined, our_messages, train

import keras_dwa
from keras_dwa import DynamicWeightAverage, dwa_weights


@pytest.fixture
def dwa():
    return DynamicWeightAverage(["easy", "hard"], temperature=0.2)


def test_second_fit_on_the_same_model_continues_the_history(dwa):
    model = dict_model()
    first = train(model, dwa, epochs=3)
    check_run(joined(first, train(model, dwa, epochs=3)), dwa)


def test_second_fit_without_a_new_compile_continues_the_history(dwa):
    model = dict_model()
    first = train(model, dwa, epochs=1)
    second = model.fit(X, Y, batch_size=8, epochs=4, verbose=0, callbacks=[dwa]).history
    check_run(joined(first, second), dwa)


def test_second_model_starts_afresh(dwa):
    train(dict_model(), dwa, epochs=4)
    check_run(train(dict_model(), dwa, epochs=4), dwa)


def test_return_to_the_first_model_starts_afresh(dwa):
    model = dict_model()
    train(model, dwa, epochs=3)
    train(dict_model(), dwa, epochs=3)
    with pytest.warns(UserWarning, match="comes back to a model"):
        history = train(model, dwa, epochs=4)
    check_run(history, dwa)


def test_first_model_starts_afresh_after_steps_without_one(dwa):
    for easy in (4.0, 1.0):
        dwa.step({"easy": easy, "hard": 1.0})
    check_run(train(dict_model(), dwa, epochs=4), dwa)


def test_second_model_starts_afresh_after_a_file_was_read(dwa, tmp_path):
    model = dict_model()
    train(model, dwa)
    model.save_weights(tmp_path / "w.weights.h5")
    model.load_weights(tmp_path / "w.weights.h5")
    check_run(train(dict_model(), dwa, epochs=4), dwa)


def test_reset_starts_afresh(dwa):
    model = dict_model()
    train(model, dwa, epochs=3)
    dwa.reset()
    check_run(train(model, dwa, epochs=4), dwa)


def test_evaluate_before_the_first_fit_does_no_harm(dwa, mode):
    model = dict_model()
    model.compile("sgd", LOSSES, loss_weights=dwa.loss_weights, **mode)
    model.evaluate(X, Y, batch_size=8, verbose=0)
    history = model.fit(
        X, Y, batch_size=8, epochs=4, validation_split=0.2, verbose=0, callbacks=[dwa]
    ).history
    check_run(history, dwa)


def test_evaluate_after_training_uses_the_current_weights(dwa):
    model = dict_model()
    train(model, dwa)
    results = model.evaluate(X, Y, batch_size=8, verbose=0, return_dict=True)
    weights = {name: float(weight) for name, weight in dwa.loss_weights.items()}
    expected = sum(weights[name] * results[f"{name}_loss"] for name in weights)
    np.testing.assert_allclose(results["loss"], expected, rtol=1e-5)
    assert abs(weights["easy"] - 1) > 1e-3


def test_first_fit_after_a_refused_one_moves_the_weights(dwa):
    model = dict_model()
    model.compile("sgd", LOSSES)
    with pytest.raises(ValueError, match=r"loss_weights=weighting\.loss_weights"):
        model.fit(X, Y, verbose=0, callbacks=[dwa])
    check_run(train(model, dwa), dwa)


def test_callbacks_in_turn_on_one_model_each_start_afresh_and_leave_nothing_behind(dwa):
    model = dict_model()
    variables = []
    for callback in (dwa, DynamicWeightAverage(["easy", "hard"], temperature=0.1), dwa):
        check_run(train(model, callback), callback)
        variables.append(len(model.metrics_variables))
    assert len(set(variables)) == 1


def test_step_moves_the_weights_of_train_on_batch():
    model = dict_model()
    dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
    model.compile(keras.optimizers.SGD(0.05), LOSSES, loss_weights=dwa.loss_weights)
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

    class Scale(keras.layers.Layer):
        def call(self, inputs):
            return keras.ops.convert_to_tensor(weight)

    # In a layer of half precision, Keras would round other variables to 1.0.
    scale = keras.ops.convert_to_numpy(Scale(dtype="mixed_float16")(X))
    assert (scale.dtype, scale) == ("float32", np.float32(1.0001))


def test_state_tree_of_the_model_is_readable(dwa):
    model = dict_model()
    train(model, dwa, epochs=1)
    tree = model.get_state_tree()
    assert "loss_weights" in str(tree["metrics_variables"])


def test_model_keeps_its_own_weights_and_summary(dwa, capsys):
    model = dict_model()
    model.compile("sgd", LOSSES)
    model.summary()
    summary, before = capsys.readouterr().out, [v.path for v in model.weights]
    train(model, dwa)
    model.summary()
    # The optimizer's variables, which `summary` counts once it is built, apart.
    assert capsys.readouterr().out.splitlines()[:10] == summary.splitlines()[:10]
    assert [v.path for v in model.weights] == before


def test_warnings_name_the_line_that_they_are_about(dwa):
    first, second = dict_model(), dict_model()
    for model in (first, second):
        model.compile("sgd", LOSSES, loss_weights=dwa.loss_weights)
        dwa.set_model(model)
    with pytest.warns(UserWarning, match="comes back") as of_model:
        dwa.set_model(first)
    with pytest.warns(UserWarning, match="not finite") as of_loss:
        dwa.step({"easy": float("nan"), "hard": 1.0})
    ours = [warning for warning in [*of_model, *of_loss] if our_messages([warning])]
    assert [warning.filename for warning in ours] == [__file__] * 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callbacks: map(copy.copy, callbacks)])
def test_copy_moves_the_weights_that_the_model_has(dwa, copied):
    model = dict_model()
    model.compile(keras.optimizers.SGD(0.05), LOSSES, loss_weights=dwa.loss_weights)
    (copied,) = copied([dwa])
    history = model.fit(X, Y, batch_size=8, epochs=4, verbose=0, callbacks=[copied]).history
    check_run(history, copied)
    assert copied.step() == dwa.step()


@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_pickled_callback_goes_on_without_the_original(module):
    dwa = DynamicWeightAverage({"easy": 3.0, "hard": 0.5}, temperature=0.2, verbose=1)
    train(dict_model(), dwa)
    moved = dwa.step()
    unpickled = module.loads(module.dumps(dwa))
    assert (repr(unpickled), unpickled.verbose) == (repr(dwa), 1)
    assert unpickled.step() == moved
    losses = {"easy": 0.1, "hard": 0.7}
    expected = unpickled.step(losses)
    assert expected != moved
    assert dwa.step() == moved
    assert dwa.step(losses) == expected
    first, second = (train(dict_model(), unpickled) for _ in range(2))
    assert (first["easy_weight"][0], first["hard_weight"][0]) == (
        expected["easy"],
        expected["hard"],
    )
    check_run(second, unpickled)
    assert dwa.step() == expected


def test_callback_pickled_within_an_epoch_has_its_weights(dwa):
    model = dict_model()
    train(model, dwa)
    moved, pickled = dwa.step(), []

    class Pickle(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            pickled.append(pickle.dumps(dwa))

    model.fit(X, Y, batch_size=20, verbose=0, callbacks=[dwa, Pickle()])
    assert [pickle.loads(data).step() for data in pickled] == [moved, moved]


def test_temperature_assigned_later_moves_the_next_weights(dwa):
    dwa.step({"easy": 2.0, "hard": 4.0})
    dwa.temperature = 5.0
    weights = dwa.step({"easy": 1.0, "hard": 3.0})
    expected = dwa_weights([1.0, 3.0], [2.0, 4.0], 5.0)
    np.testing.assert_allclose([weights["easy"], weights["hard"]], expected, rtol=1e-6)


def test_step_moves_the_weights_by_the_averages_given(dwa):
    assert dwa.step({"easy": 2.0, "hard": 4.0}) == {"easy": 1.0, "hard": 1.0}
    weights = dwa.step({"hard": 3.0, "easy": 1.0})
    expected = dwa_weights([1.0, 3.0], [2.0, 4.0], 0.2)
    np.testing.assert_allclose([weights["easy"], weights["hard"]], expected, rtol=1e-6)
    assert weights["hard"] > weights["easy"]


def test_step_takes_tensors_and_numpy_scalars(dwa):
    dwa.step({"easy": np.float32(2.0), "hard": keras.ops.convert_to_tensor(4.0)})
    assert dwa.step({"easy": 1, "hard": np.array(4.0)})["hard"] > 1.5


def test_step_takes_low_precision_tensors_and_those_that_have_a_gradient(dwa):
    dwa.step({"easy": keras.ops.cast(2.0, "bfloat16"), "hard": keras.ops.cast(4.0, "float16")})
    # On torch, the value of a trainable variable has a gradient.
    weights = dwa.step({"easy": keras.Variable(1.0).value, "hard": 3.0})
    expected = dwa_weights([1.0, 3.0], [2.0, 4.0], 0.2)
    np.testing.assert_allclose([weights["easy"], weights["hard"]], expected, rtol=1e-6)


def test_step_takes_floats_beyond_float32(dwa):
    dwa.step({"easy": 2e300, "hard": 4e-300})
    weights = dwa.step({"easy": 1e300, "hard": 3e-300})
    expected = dwa_weights([1.0, 3.0], [2.0, 4.0], 0.2)
    np.testing.assert_allclose([weights["easy"], weights["hard"]], expected, rtol=1e-6)


def test_oldest_epoch_is_dropped(dwa):
    dwa.step({"easy": 100.0, "hard": 1.0})
    dwa.step({"easy": 2.0, "hard": 4.0})
    weights = dwa.step({"easy": 1.0, "hard": 2.0})
    np.testing.assert_allclose([weights["easy"], weights["hard"]], 1.0, rtol=1e-6)


def test_step_without_data_does_nothing(dwa):
    dwa.step({"easy": 2.0, "hard": 4.0})
    moved = dwa.step({"easy": 1.0, "hard": 3.0})
    assert dwa.step() == moved
    np.testing.assert_allclose(
        dwa.step({"easy": 1.0, "hard": 3.0})["easy"], 1.0, rtol=1e-6
    )  # The epoch before is still the last one with data.


def test_steps_keep_nothing_behind(dwa):
    package = tracemalloc.Filter(True, str(Path(keras_dwa.__file__).parent / "*"))

    def allocated():
        gc.collect()
        snapshot = tracemalloc.take_snapshot().filter_traces([package])
        return sum(statistic.size for statistic in snapshot.statistics("filename"))

    tracemalloc.start()
    try:
        sizes = []
        for epoch in range(400):
            if epoch in (20, 399):
                sizes.append(allocated())
            dwa.step({"easy": 2.0 + np.sin(epoch), "hard": 1.0})
    finally:
        tracemalloc.stop()
    assert sizes[1] < sizes[0] + 1000


def test_reset_within_an_epoch_reaches_the_next_step(dwa):
    model = dict_model()
    train(model, dwa)
    seen = []

    class Reset(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            dwa.reset()
            seen.append(dwa.step())

    model.fit(X, Y, batch_size=8, verbose=0, callbacks=[dwa, Reset()])
    assert seen[-1] == {"easy": 1.0, "hard": 1.0}


def test_repr_shows_outputs_and_temperature(dwa):
    assert repr(dwa) == "DynamicWeightAverage(['easy', 'hard'], temperature=0.2)"
    assert repr(DynamicWeightAverage({"a": 2, "b": 1})) == (
        "DynamicWeightAverage({'a': 2.0, 'b': 1.0}, temperature=2.0)"
    )
