"""Factors assigned by hand reach the next step, and the logs show those of each epoch."""

import itertools
import re

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
    Y,
    check_base_loss,
    compiled,
    dict_model,
    fit,
    one_backend,
    train,
)
from loops import value_and_gradient

from keras_dwa import CompoundLoss, DynamicWeightAverage, LossWeighting

BASE = {"easy": 3.0, "hard": 0.5}


@pytest.fixture
def weighting():
    return LossWeighting(BASE)


@pytest.fixture(scope="module")
def under_static_weights():
    """Parameters before and after three epochs, compiled again whenever the weights change."""
    model, optimizer = dict_model(), keras.optimizers.SGD(0.05)
    initial, starts = model.get_weights(), itertools.cycle(range(0, 40, 8))
    for easy, hard, batches in [(3.0, 0.5, 2), (3.0, 0.0, 3), (6.0, 0.0, 5), (6.0, 1.0, 5)]:
        model.compile(optimizer, LOSSES, loss_weights={"easy": easy, "hard": hard})
        for start in itertools.islice(starts, batches):
            batch = slice(start, start + 8)
            model.train_on_batch(X[batch], {name: target[batch] for name, target in Y.items()})
    return initial, model.get_weights()


@pytest.mark.parametrize(
    ("way", "eager"), [("compile", False), ("compute_loss", False), ("compile", True)]
)
def test_factors_assigned_in_other_callbacks_reach_the_next_step(
    weighting, way, eager, under_static_weights
):
    initial, expected = under_static_weights
    model = dict_model() if way == "compile" else ComputeLoss(weighting)
    model(X)
    model.set_weights(initial)
    steps = itertools.count()
    assign = Lambda(
        on_train_batch_begin=lambda batch, logs: (
            next(steps) == 2 and weighting.assign({"hard": 0.0})
        ),
        on_epoch_end=lambda epoch, logs: epoch == 0 and weighting.assign({"easy": 2.0}),
        on_epoch_begin=lambda epoch, logs: epoch == 2 and weighting.assign({"hard": 2.0}),
    )
    compiled(model, weighting, run_eagerly=eager)
    history = fit(model, weighting, assign, validation_data=(X, Y))

    for ours, static in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(ours, static, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(history["easy_weight"], [3, 6, 6], rtol=1e-6)
    np.testing.assert_allclose(history["hard_weight"], [2 / 5 * 0.5, 0, 1], rtol=1e-6)
    check_base_loss(history, BASE)
    # Each validation had the weights of the epoch's last batch.
    easy, hard = (np.array(history[f"val_{name}_loss"]) for name in NAMES)
    np.testing.assert_allclose(history["val_loss"], easy * [3, 6, 6] + hard * [0, 0, 1], rtol=1e-5)


@one_backend
def test_factors_assigned_before_a_fit_hold_for_its_model(weighting):
    def hard_weight(*others):
        return train(dict_model(), weighting, epochs=1, others=others)["hard_weight"]

    weighting.assign({"hard": 0.0})
    assert hard_weight() == [0.0]
    assert weighting.factors == {"easy": 1.0, "hard": 0.0}
    weighting.assign({"hard": 7.0})
    weighting.reset()
    # The next model does not get what another callback assigns at the end.
    at_the_end = Lambda(on_epoch_end=lambda epoch, logs: weighting.assign({"hard": 9.0}))
    assert hard_weight(at_the_end) == [0.5]
    assert hard_weight() == [0.5]


@pytest.mark.parametrize("compiled", [True, False])
def test_factors_assigned_in_a_loop_reach_the_gradient(weighting, compiled):
    compound = CompoundLoss(NAMES, weighting)

    def loss(point):
        return compound.combine({"easy": point[0] ** 2, "hard": 5 * point[1]})

    point = np.array([3.0, 4.0], "float32")
    for hard in (0.0, 0.25):
        weighting.assign({"hard": np.float32(hard)})
        value, gradient = value_and_gradient(loss, point, compiled)
        np.testing.assert_allclose(value, 3 * 9 + 0.5 * hard * 20, rtol=1e-6)
        np.testing.assert_allclose(gradient, [3 * 6, 0.5 * hard * 5], rtol=1e-6)


@one_backend
def test_assignment_within_an_epoch_leaves_what_was_recorded(weighting):
    CompoundLoss(NAMES, weighting).combine({"easy": 4.0, "hard": 1.0})
    weighting.assign({"easy": 9.0})
    assert weighting._weights.recorded().tolist() == [4.0, 1.0, 1.0]


@one_backend
def test_factors_are_kept_as_given_and_may_be_tensors(weighting):
    weighting.assign({"easy": 0.1, "hard": keras.ops.convert_to_tensor(0.5)})
    assert weighting.factors == {"easy": 0.1, "hard": 0.5}
    weights = {name: float(weight) for name, weight in weighting.loss_weights.items()}
    assert weights == pytest.approx({"easy": 0.3, "hard": 0.25}, rel=1e-6)


@one_backend
def test_factors_of_a_rule_last_until_it_moves_them():
    dwa = DynamicWeightAverage(NAMES)
    dwa.assign({"easy": 7.0})
    assert dwa.step({"easy": 2.0, "hard": 4.0}) == {"easy": 7.0, "hard": 1.0}
    assert sum(dwa.step({"easy": 1.0, "hard": 3.0}).values()) == pytest.approx(2)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="on TensorFlow, Keras waits for each batch")
def test_assignment_beside_the_next_steps_says_where_to_call_it(weighting):
    class Beside(keras.callbacks.Callback):
        async_safe = True

        def on_train_batch_end(self, batch, logs=None):
            weighting.assign({"easy": 2.0})

    with pytest.raises(RuntimeError, match=r"in another thread\. Call it in `on_epoch_begin`"):
        train(dict_model(), weighting, others=[Beside()])


@one_backend
@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"third": 1.0}, "`assign`: found ['third']. The outputs are ['easy', 'hard']."),
        ({"hard": -0.5}, "`assign`: found -0.5 for 'hard'. A factor must be a finite number >= 0"),
        ({"hard": float("nan")}, "found nan for 'hard'"),
        ({"easy": "2"}, "found '2' for 'easy'"),
        # Times its base weight of 3, it is infinite in float32.
        ({"easy": 2e38}, "found 2e+38 for 'easy'. A factor must be a finite number >= 0, and so"),
        ([2.0], "`assign`: expected a dict of name to factor. Found [2.0]."),
    ],
)
def test_factors_must_be_finite_numbers_by_output_name(weighting, factors, message):
    weighting.assign({"hard": 0.25})
    with pytest.raises(ValueError, match=re.escape(message)):
        weighting.assign(factors)
    assert weighting.factors == {"easy": 1.0, "hard": 0.25}


@one_backend
def test_entries_are_read_only(weighting):
    weight = weighting.loss_weights["easy"]
    with pytest.raises(RuntimeError, match=r"assigned to 'easy_weight'.*\n.*\.assign\({'easy'"):
        weight.assign_add(7.0)
    assert repr(weight) == "<LossWeight easy_weight>"
    assert float(weight) == 3.0


@one_backend
def test_values_that_a_state_tree_assigned_are_replaced(weighting):
    model = dict_model()
    train(model, weighting, epochs=1)
    tree = model.get_state_tree("numpy_array")
    weighting.assign({"easy": 2.0})
    model.set_state_tree(tree)
    history = fit(model, weighting, epochs=1)
    total = 6 * history["easy_loss"][0] + 0.5 * history["hard_loss"][0]
    np.testing.assert_allclose(history["loss"], total, rtol=1e-5)


@one_backend
def test_all_losses_may_be_off(weighting):
    weighting.assign({"easy": 0.0, "hard": 0.0})
    history = train(dict_model(), weighting, epochs=1)
    assert history["loss"] == [0.0]
    assert history["base_loss"][0] > 0
