"""The two epochs that DWA remembers: when they continue, start again, and what they survive."""

import copy
import functools
import pickle

import keras
import numpy as np
import pytest
from common import (
    NAMES,
    Lambda,
    X,
    check_run,
    compiled,
    deep_elsewhere,
    dict_model,
    fit,
    joined,
    move,
    one_backend,
    train,
)

from keras_dwa import DynamicWeightAverage, dwa_weights


def test_next_fit_on_the_same_model_continues_the_history_in_any_mode(dwa):
    model = dict_model()
    first = train(model, dwa, epochs=1)

    def stop(batch, logs):
        model.stop_training = batch == 2

    # The model is neither compiled again nor trained to the end of its first epoch.
    second = fit(model, dwa, Lambda(on_train_batch_end=stop), epochs=2)
    assert len(second["loss"]) == 1
    third = train(model, dwa, mode={"run_eagerly": True}, epochs=1)
    check_run(joined(first, second, third), dwa)


@deep_elsewhere
def test_every_other_model_starts_again_and_so_does_a_reset(dwa):
    models = [dict_model() for _ in range(2)]
    # A remembered epoch would show in the first two epochs, and moved weights in the first.
    move(dwa)
    for model in models:
        check_run(train(model, dwa), dwa)
    with pytest.warns(
        UserWarning, match=r"another model in between.*\n.*=other_weighting\.loss_weights"
    ):
        check_run(train(models[0], dwa), dwa)
    dwa.reset()
    check_run(train(models[0], dwa, epochs=2), dwa)


@one_backend
def test_callbacks_in_turn_on_one_model_each_start_again_and_leave_nothing_behind(dwa):
    model = dict_model()
    own, variables = [variable.path for variable in model.weights], []
    for callback in (dwa, DynamicWeightAverage(NAMES, temperature=0.1), dwa):
        check_run(train(model, callback), callback)
        variables.append([variable.path for variable in model.metrics_variables])
    assert variables[0] == variables[1] == variables[2]
    assert [variable.path for variable in model.weights] == own
    assert "loss_weights" in str(model.get_state_tree()["metrics_variables"])


def test_weights_are_scalars_that_nothing_trains_or_rounds():
    dwa = DynamicWeightAverage({"heads/easy": 1.0001})
    (weight,) = dwa.loss_weights.values()
    assert (weight.name, weight.shape, weight.trainable) == ("heads.easy_weight", (), False)
    assert [variable.trainable for variable in dwa.variables] == [False]

    class Scale(keras.layers.Layer):
        def call(self, inputs):
            assert weight.dtype == "float32"
            return keras.ops.convert_to_tensor(weight)

    with pytest.raises(TypeError, match=r"(?s)as a boolean.*loss_weights=weighting.loss_weights"):
        bool(weight)

    # In a layer of half precision, Keras would round other variables to 1.0.
    scale = keras.ops.convert_to_numpy(Scale(dtype="mixed_float16")(X))
    assert (scale.dtype, scale) == ("float32", np.float32(1.0001))


@one_backend
def test_warnings_name_the_line_that_they_are_about(dwa):
    first, second = (compiled(dict_model(), dwa) for _ in range(2))
    dwa.set_model(first)
    dwa.set_model(second)
    with pytest.warns(UserWarning, match="another model in between") as of_model:
        dwa.set_model(first)
    with pytest.warns(UserWarning, match="not finite") as of_loss:
        dwa.step({"easy": float("nan"), "hard": 1.0})
    assert [warned.pop().filename for warned in (of_model, of_loss)] == [__file__] * 2


@one_backend
def test_copy_is_the_original_and_a_pickled_callback_continues_without_it():
    dwa = DynamicWeightAverage({"easy": 3.0, "hard": 0.5}, temperature=0.2, verbose=1)
    within = Lambda(on_train_batch_end=lambda batch, logs: pickle.dumps(dwa))
    train(dict_model(), dwa, others=[within])
    moved = dwa.step()
    assert copy.copy(dwa) is copy.deepcopy([dwa])[0] is dwa
    weights = dwa.loss_weights
    assert copy.copy(weights["easy"]) is copy.deepcopy(weights)["easy"] is weights["easy"]
    unpickled = pickle.loads(pickle.dumps(dwa))
    assert (repr(unpickled), unpickled.verbose) == (repr(dwa), 1)
    expected = unpickled.step({"easy": 0.1, "hard": 0.7})
    assert dwa.step() == moved != expected
    assert dwa.step({"easy": 0.1, "hard": 0.7}) == expected
    # Its first model continues, the next one starts again.
    first = train(dict_model(), unpickled, epochs=1)
    assert {name: first[f"{name}_weight"][0] for name in expected} == expected
    check_run(train(dict_model(), unpickled, epochs=2), unpickled)


def test_step_moves_the_weights_by_the_averages_given_of_any_kind(dwa):
    kinds = [int, np.float32, np.array, keras.ops.convert_to_tensor]
    kinds += [functools.partial(keras.ops.cast, dtype=dtype) for dtype in ("bfloat16", "float16")]
    # Beyond float32; and on torch, the value of a trainable variable has a gradient.
    kinds += [(1e300).__mul__, (1e-300).__mul__, lambda value: keras.Variable(value).value]
    for kind in kinds:
        dwa.reset()
        dwa.step({"easy": kind(2.0), "hard": kind(4.0)})
        weights = dwa.step({"hard": kind(3.0), "easy": kind(1.0)})
        expected = dwa_weights([1.0, 3.0], [2.0, 4.0], 0.2)
        np.testing.assert_allclose([weights["easy"], weights["hard"]], expected, rtol=1e-6)
