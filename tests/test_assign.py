"""Factors assigned by hand: they reach the next step, and the logs say what each epoch had."""

import re

import keras
import numpy as np
import pytest
from common import (
    BACKEND,
    LOSSES,
    ComputeLoss,
    X,
    Y,
    dict_model,
    floatx,
    one_backend,
    our_messages,
    train,
)
from loops import value_and_gradient
from run_to_kill import Stop

from keras_dwa import CompoundLoss, DynamicWeightAverage, LossWeighting, dwa_weights


@pytest.fixture
def weighting():
    return LossWeighting({"easy": 3.0, "hard": 0.5})


class Assign(keras.callbacks.Callback):
    """Assigns factors in the hooks that are named, at an epoch and, there, a batch."""

    def __init__(self, weighting, **plan):
        super().__init__()
        self.weighting, self.plan = weighting, plan

    def _assign(self, hook, at):
        if at in self.plan.get(hook, {}):
            self.weighting.assign(self.plan[hook][at])

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self._assign("on_epoch_begin", epoch)

    def on_train_batch_begin(self, batch, logs=None):
        self._assign("on_train_batch_begin", (self.epoch, batch))

    def on_epoch_end(self, epoch, logs=None):
        self._assign("on_epoch_end", epoch)


def parameters_under_static_weights(initial, weights):
    """Trained batch by batch, compiled anew where the (easy, hard) weights differ."""
    model = dict_model()
    model.set_weights(initial)
    former, optimizer = None, keras.optimizers.SGD(0.05)
    for index, (easy, hard) in enumerate(weights):
        if (easy, hard) != former:
            static = {"easy": float(easy), "hard": float(hard)}
            model.compile(optimizer, LOSSES, loss_weights=static)
        former = easy, hard
        batch = slice(index % 5 * 8, index % 5 * 8 + 8)
        model.train_on_batch(X[batch], {name: target[batch] for name, target in Y.items()})
    return model.get_weights()


@pytest.mark.every_mode
def test_factors_assigned_in_other_callbacks_reach_the_next_step(weighting, mode):
    if "steps_per_execution" in mode:
        pytest.skip("a batch alone cannot be assigned for there")
    check_assigned_factors(weighting, mode, lambda assign: [weighting, assign])


def test_callback_that_assigns_may_come_before_where_callbacks_wait_for_each_batch(weighting):
    wait = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None)
    check_assigned_factors(weighting, {}, lambda assign: [assign, weighting, wait])


def check_assigned_factors(weighting, mode, callbacks):
    assign = Assign(
        weighting,
        on_train_batch_begin={(0, 2): {"hard": 0.0}},
        on_epoch_end={0: {"easy": 2.0}},
        on_epoch_begin={2: {"hard": 2.0}},
    )
    model = dict_model()
    initial = model.get_weights()
    weights = weighting.loss_weights
    model.compile(keras.optimizers.SGD(0.05), LOSSES, loss_weights=weights, **mode)
    fit = {"batch_size": 8, "epochs": 3, "shuffle": False, "verbose": 0}
    history = model.fit(X, Y, validation_data=(X, Y), callbacks=callbacks(assign), **fit).history

    had = [(3, 0.5)] * 2 + [(3, 0)] * 3 + [(6, 0)] * 5 + [(6, 1)] * 5
    expected = parameters_under_static_weights(initial, had)
    for ours, static in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(ours, static, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(history["easy_weight"], [3, 6, 6], rtol=1e-6)
    np.testing.assert_allclose(history["hard_weight"], [2 / 5 * 0.5, 0, 1], rtol=1e-6)
    # Each validation had the weights of the epoch's last batch.
    for key, (easy, hard) in {
        "val_loss": [(3, 6, 6), (0, 0, 1)],
        "val_base_loss": (3, 0.5),
    }.items():
        parts = (
            np.array(easy) * history["val_easy_loss"] + np.array(hard) * history["val_hard_loss"]
        )
        np.testing.assert_allclose(history[key], parts, rtol=1e-5)


@one_backend
def test_factors_assigned_before_a_fit_hold_for_its_model(weighting):
    weighting.assign({"hard": 0.0})
    assert train(dict_model(), weighting, epochs=2)["hard_weight"] == [0.0, 0.0]
    assert weighting.factors == {"easy": 1.0, "hard": 0.0}
    assert train(dict_model(), weighting, epochs=1)["hard_weight"] == [0.5]
    weighting.assign({"easy": 2.0})
    model = dict_model()
    history = train(model, weighting, epochs=1)
    assert (history["easy_weight"], history["hard_weight"]) == ([6.0], [0.5])
    assert train(model, weighting, epochs=1)["easy_weight"] == [6.0]
    weighting.reset()
    assert train(model, weighting, epochs=1)["easy_weight"] == [3.0]
    with pytest.raises(KeyboardInterrupt):
        train(dict_model(), weighting, others=[Stop(0, 1)])
    weighting.assign({"hard": 0.0})
    assert train(dict_model(), weighting, epochs=1)["hard_weight"] == [0.0]
    # What another callback assigned at the end is not for the next model.
    train(
        dict_model(),
        weighting,
        epochs=1,
        others=[Assign(weighting, on_epoch_end={0: {"hard": 9.0}})],
    )
    assert train(dict_model(), weighting, epochs=1)["hard_weight"] == [0.5]


@pytest.mark.parametrize("compiled", [True, False])
def test_factors_assigned_in_a_loop_reach_the_gradient(weighting, compiled):
    compound = CompoundLoss(list(LOSSES), weighting)

    def loss(point):
        return compound.combine({"easy": point[0] ** 2, "hard": 5 * point[1]})

    point = np.array([3.0, 4.0], "float32")
    for hard in (0.0, 0.25):
        weighting.assign({"hard": np.float32(hard)})
        value, gradient = value_and_gradient(loss, point, compiled)
        np.testing.assert_allclose(value, 3 * 9 + 0.5 * hard * 20, rtol=1e-6)
        np.testing.assert_allclose(gradient, [3 * 6, 0.5 * hard * 5], rtol=1e-6)


@one_backend
def test_assignment_within_an_epoch_leaves_what_was_recorded():
    dwa = DynamicWeightAverage(["easy", "hard"])
    compound = CompoundLoss(list(LOSSES), dwa)
    for hard in (3.0, 1.0):
        compound.combine({"easy": 4.0, "hard": 1.0})
        dwa.assign({"easy": 9.0})
        compound.combine({"easy": 4.0, "hard": hard})
        factors = dwa.step()
    np.testing.assert_allclose(list(factors.values()), dwa_weights([4, 1], [4, 2]), rtol=1e-6)


@one_backend
def test_factors_are_kept_as_given_and_may_be_tensors(weighting):
    weighting.assign({"easy": 0.1, "hard": keras.ops.convert_to_tensor(0.5)})
    assert weighting.factors == {"easy": 0.1, "hard": 0.5}
    weights = {name: float(weight) for name, weight in weighting.loss_weights.items()}
    assert weights == pytest.approx({"easy": 0.3, "hard": 0.25}, rel=1e-6)


@one_backend
def test_factors_of_a_rule_last_until_it_moves_them():
    dwa = DynamicWeightAverage(["easy", "hard"])
    model = dict_model()
    train(model, dwa)
    dwa.assign({"easy": 7.0})
    history = train(model, dwa, epochs=2)
    assert history["easy_weight"][0] == 7.0
    assert history["easy_weight"][1] < 2.0


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
        ({"third": 1.0}, "`assign` gave factors for ['third']. The outputs are ['easy', 'hard']."),
        ({"hard": -0.5}, "`assign` gave -0.5 for 'hard'. A factor is a finite number >= 0"),
        ({"hard": float("nan")}, "gave nan for 'hard'"),
        ({"easy": float("inf")}, "gave inf for 'easy'"),
        ({"easy": 10**400}, "for 'easy'"),
        ({"easy": "2"}, "gave '2' for 'easy'"),
        ({"easy": [1.0]}, "gave [1.0] for 'easy'"),
        ({"easy": None}, "gave None for 'easy'"),
        # Times its base weight of 3, it is infinite in float32.
        ({"easy": 2e38}, "gave 2e+38 for 'easy'. A factor is a finite number >= 0, also times its"),
        ([2.0], "`assign` gave [2.0]. It must give a dict of name to factor."),
        (None, "`assign` gave None. It must give a dict of name to factor."),
    ],
)
def test_factors_must_be_finite_numbers_by_output_name(weighting, factors, message):
    weighting.assign({"hard": 0.25})
    with pytest.raises(ValueError, match=re.escape(message)):
        weighting.assign(factors)
    assert weighting.factors == {"easy": 1.0, "hard": 0.25}


def test_factor_may_be_as_large_as_floatx_allows():
    LossWeighting(["easy"]).assign({"easy": float(np.finfo("float32").max)})
    with floatx("float64"):
        weighting = LossWeighting({"easy": 3.0})
        weighting.assign({"easy": 2e38})
        assert float(weighting.loss_weights["easy"]) == 6e38


def test_entries_are_read_only(weighting):
    weight = weighting.loss_weights["easy"]
    for assign in (weight.assign, weight.assign_add, weight.assign_sub):
        with pytest.raises(RuntimeError, match=r"assigned to 'easy_weight'.*\n.*\.assign\({'easy'"):
            assign(7.0)
    assert repr(weight) == "<LossWeight easy_weight>"
    assert float(weight) == 3.0


def test_variables_of_a_former_epoch_are_warned_of_and_replaced():
    # As a loop under `jax.jit` assigns them that read them too early.
    dwa = DynamicWeightAverage(["easy", "hard"])
    former = keras.ops.convert_to_numpy(dwa.variables[0]).copy()
    dwa.step({"easy": 2.0, "hard": 4.0})
    moved = dwa.step({"easy": 1.0, "hard": 3.0})
    dwa.variables[0].assign(former)
    with pytest.warns(UserWarning, match="by hand, .*read `weighting.variables` anew after each"):
        dwa.step({"easy": 0.5, "hard": float("inf")})
    assert {name: float(weight) for name, weight in dwa.loss_weights.items()} == moved


@pytest.mark.parametrize("way", ["by hand", "in its state tree"])
def test_values_assigned_to_the_vector_are_warned_of_and_replaced(way):
    model, dwa = dict_model(), DynamicWeightAverage(["easy", "hard"], temperature=0.2)
    train(model, dwa)
    own, tree = dwa.step(), model.get_state_tree("numpy_array")
    if way == "by hand":
        dwa.variables[0].assign(np.array([7.0, np.nan]))
    else:
        train(model, dwa, epochs=1)
        own = dwa.step()
        model.set_state_tree(tree)
    with pytest.warns(UserWarning, match="DynamicWeightAverage") as warned:
        history = model.fit(X, Y, batch_size=8, verbose=0, callbacks=[dwa]).history
    (message,) = our_messages(warned)
    assert f"by hand, {{'easy': {'7.0' if way == 'by hand' else ''}" in message
    assert f"goes on with its own, {own}" in message
    assert {name: history[f"{name}_weight"][0] for name in own} == own


@pytest.mark.parametrize("kind", [np.nan, np.inf])
def test_loss_that_is_not_finite_poisons_the_step_at_weight_zero_and_is_warned_of(kind, mode):
    """0 * nan is nan in Keras's step: what goes into the loss must be made finite."""

    def fit(target):
        weighting = LossWeighting(["easy", "hard"])
        weighting.assign({"hard": 0.0})
        model = dict_model()
        loss, targets = {"easy": "mse", "hard": "mse"}, {**Y, "hard": target}
        train(model, weighting, y=targets, loss=loss, epochs=1, mode=mode)
        return np.isfinite(np.concatenate([w.ravel() for w in model.get_weights()])).all()

    target = np.full_like(Y["hard"], kind)
    with pytest.warns(UserWarning, match="LossWeighting found") as warned:
        assert not fit(target)
    message = str(next(w.message for w in warned if "LossWeighting" in str(w.message)))
    assert "the loss of ['hard'] not finite while its weight was 0" in message
    assert fit(keras.ops.convert_to_numpy(keras.ops.nan_to_num(target, posinf=0.0)))


@one_backend
def test_all_losses_may_be_off(weighting):
    weighting.assign({"easy": 0.0, "hard": 0.0})
    history = train(dict_model(), weighting, epochs=2)
    assert history["loss"] == [0.0, 0.0]
    assert min(history["base_loss"]) > 0


@one_backend
def test_weights_loaded_within_an_epoch_count_from_their_batch(weighting, tmp_path):
    class Load(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                self.model.load_weights(tmp_path / "file.weights.h5")

    model = dict_model()
    weighting.assign({"easy": 2.0})
    train(model, weighting, epochs=1)
    model.save_weights(tmp_path / "file.weights.h5")
    weighting.assign({"easy": 1.0})
    history = model.fit(X, Y, batch_size=8, verbose=0, callbacks=[weighting, Load()]).history
    np.testing.assert_allclose(history["easy_weight"], [(3 * 3.0 + 2 * 6.0) / 5], rtol=1e-6)


def test_model_has_one_more_array_than_with_static_weights():
    names = [f"head_{k}" for k in range(4)]
    inputs = keras.Input((4,))
    heads = {name: keras.layers.Dense(1, name=name)(inputs) for name in names}
    targets = dict.fromkeys(names, Y["easy"])

    def arrays(weighting):
        model = keras.Model(inputs, heads)
        model.compile(
            "sgd",
            dict.fromkeys(names, "mse"),
            loss_weights=weighting.loss_weights if weighting else None,
        )
        model.fit(X, targets, verbose=0, callbacks=[weighting] if weighting else [])
        return len(model.metrics_variables) + len(model.variables)

    assert arrays(LossWeighting(names)) == arrays(None) + 1


def test_compound_loss_trains_by_factors_assigned_within_fit(weighting, mode):
    model = ComputeLoss(weighting)
    model.compile(keras.optimizers.SGD(0.05), **mode)
    assign = Assign(weighting, on_epoch_begin={1: {"hard": 0.0}})
    kernels = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: had.append(model.hard.get_weights()[0])
    )
    had = []
    fit = {"batch_size": 8, "epochs": 3, "verbose": 0, "validation_split": 0.2}
    history = model.fit(X, Y, callbacks=[weighting, assign, kernels], **fit).history
    assert history["hard_weight"] == [0.5, 0.0, 0.0]
    np.testing.assert_allclose(history["loss"][1], 3 * history["easy_loss"][1], rtol=1e-5)
    np.testing.assert_array_equal(had[0], had[2])
    parts = [3 * history["val_easy_loss"][2], 0.5 * history["val_hard_loss"][2]]
    np.testing.assert_allclose(history["val_base_loss"][2], sum(parts), rtol=1e-5)
