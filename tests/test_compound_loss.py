"""The compound loss: custom loops, terms that are not outputs, and `compute_loss` under `fit`."""

import copy
import pickle
import re

import keras
import numpy as np
import pytest
from common import (
    LOSSES,
    NAMES,
    ComputeLoss,
    X,
    Y,
    check_run,
    compiled,
    dict_model,
    fit,
    floatx,
    move,
    one_backend,
)
from loops import train_loop, value_and_gradient

from keras_dwa import CompoundLoss, DynamicWeightAverage, LossWeighting, dwa_weights

ONES = {"easy": 1.0, "hard": 1.0}


def new_dwa():
    return DynamicWeightAverage({"easy": 3.0, "hard": 0.5}, temperature=0.2)


@pytest.fixture
def dwa():
    return new_dwa()


@pytest.fixture
def compound(dwa):
    return CompoundLoss(LOSSES, dwa)


# The value and its gradient. That of `combine` is in `test_assign.py`.


def test_stateless_loss_has_no_gradient_by_weights_or_record_and_records_nothing(dwa, compound):
    variables = [keras.ops.convert_to_tensor(variable) for variable in dwa.variables]
    targets = {name: keras.ops.convert_to_tensor(Y[name]) for name in Y}

    def losses_and_record(point):
        weights = keras.ops.stack([point, point / 2])
        y_pred = {name: target + point for name, target in targets.items()}
        called, new = compound.stateless_call([weights, *variables[1:]], targets, y_pred)
        combined, new = compound.stateless_combine(new, {"hard": 2 * point, "easy": point})
        return called + combined + keras.ops.sum(new[-1])

    value, gradient = value_and_gradient(losses_and_record, np.float32(1.0), compiled=True)
    recorded = 2 * ((1 + 1 + 1) * len(X) + 1 + 2 + 1)
    np.testing.assert_allclose(value, 1.5 + 2 + recorded, rtol=1e-6)
    np.testing.assert_allclose(gradient, (1 * 2 + 0.5 * 1) + (1 * 1 + 0.5 * 2), rtol=1e-6)
    assert not dwa._weights.recorded().any()


@pytest.mark.parametrize("by_name", [True, False])
def test_sample_weights_by_name_or_for_all(compound, by_name):
    halves = (np.arange(len(X)) % 2).astype("float32")
    y_pred = {**{name: 0 * Y[name] for name in Y}, "features without a loss": X}
    easy = halves * (Y["easy"] ** 2).mean(axis=1)
    hard = np.abs(Y["hard"]).mean(axis=1) * (1 if by_name else halves)
    loss = float(compound(Y, y_pred, {"easy": halves} if by_name else halves))
    np.testing.assert_allclose(loss, 3 * easy.mean() + 0.5 * hard.mean(), rtol=1e-5)


def test_masks_and_ranks_are_as_in_compile(dwa):
    tokens = np.arange(len(X) * 5).reshape(-1, 5) % 7  # 0 is masked.
    inputs = keras.Input((5,), dtype="int32")
    embedded = keras.layers.Embedding(7, 3, mask_zero=True)(inputs)
    scaled = keras.layers.Rescaling(0.1)(inputs)
    outputs = {"easy": keras.layers.Dense(2)(embedded), "hard": keras.layers.Dense(1)(scaled)}
    model = keras.Model(inputs, outputs)
    targets = {"easy": np.sin([tokens] * 2).transpose(1, 2, 0), "hard": Y["easy"][:, 0]}
    losses = {"easy": keras.losses.Huber(), "hard": keras.losses.mean_absolute_error}
    model.compile("sgd", losses, loss_weights=dwa.loss_weights)
    expected = model.evaluate(tokens, targets, batch_size=len(X), verbose=0)[0]
    loss = CompoundLoss(losses, dwa)(targets, model(tokens))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(loss), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("default", "dtype", "epochs", "tolerance"),
    [
        ("float16", "float32", (2e5, 1e5), 1e-3),  # Beyond float16.
        ("float64", "float64", (3 / 7, 2 / 7), 1e-12),
    ],
)
def test_losses_are_summed_and_recorded_in_float32_or_wider(default, dtype, epochs, tolerance):
    with floatx(default):
        dwa = DynamicWeightAverage(NAMES)
        compound = CompoundLoss(NAMES, dwa)
        for easy in epochs:
            terms = {"easy": np.array(easy, dtype), "hard": np.array(0.1, dtype)}
            loss = compound.combine(terms, samples=100_000)
            assert float(loss) == pytest.approx(easy + 0.1, rel=tolerance)
            weights = dwa.step()
        expected = dwa_weights([epochs[1], 0.1], [epochs[0], 0.1])
        np.testing.assert_allclose(list(weights.values()), expected, rtol=tolerance)


# The record, and `step`.


def test_calls_of_all_compound_losses_are_averaged_over_samples(dwa):
    for size, error in ((10, 1.0), (30, 2.0)):
        y_true = {name: target[:size] for name, target in Y.items()}
        y_pred = {name: target + error for name, target in y_true.items()}
        CompoundLoss(LOSSES, dwa)(y_true, y_pred)
    dwa.step()
    weights = list(dwa.step(ONES).values())
    averages = [(10 + 30 * 4) / 40, (10 + 30 * 2) / 40]
    np.testing.assert_allclose(weights, [3, 0.5] * dwa_weights([1, 1], averages, 0.2), rtol=1e-5)


@one_backend
def test_step_does_nothing_where_nothing_was_recorded_since_a_step_or_reset(dwa, compound):
    before = move(dwa)
    assert dwa.step() == before
    compound.combine({"easy": 0.5, "hard": 100.0})
    dwa.reset()
    assert dwa.step() == {"easy": 3.0, "hard": 0.5}


@one_backend
def test_step_after_calls_that_left_no_record_warns_once(dwa, compound):
    compound.stateless_combine([variable.value for variable in dwa.variables], ONES)
    message = r"nothing recorded.*`stateless_call`.*weighting\.set_model"
    with pytest.warns(UserWarning, match=message):
        dwa.step()
    dwa.step()


@one_backend
def test_recording_under_jax_jit_is_an_error_that_names_stateless_call(dwa, compound):
    import jax

    jax.jit(lambda y_pred: compound(Y, y_pred))(Y)
    with pytest.raises(ValueError, match="stateless_call"):
        dwa.step()


# `fit`, and custom loops.


def test_model_built_evaluated_and_fitted_without_the_callback_first(dwa):
    model = ComputeLoss(dwa)
    model(X)
    compiled(model, dwa).evaluate(X, Y, batch_size=8, verbose=0)
    fit(model, epochs=1, validation_split=0.2)
    check_run(fit(model, dwa, validation_split=0.2), dwa)


def test_train_on_batch_with_a_compound_loss(dwa):
    model = compiled(ComputeLoss(dwa), dwa)
    dwa.set_model(model)
    for factor in (1.0, 0.5):
        dwa.assign({"easy": factor})
        model.reset_metrics()  # Keras 3.10 does not do so itself.
        logs = model.train_on_batch(X, Y, return_dict=True)
        weighted = 3 * factor * logs["easy_loss"] + 0.5 * logs["hard_loss"]
        assert logs["loss"] == pytest.approx(weighted, rel=1e-5)
    dwa.step()
    np.testing.assert_allclose(dwa.state["losses"][-1][0], logs["easy_loss"], rtol=1e-5)


def test_compile_compute_loss_and_custom_loops_give_the_same_weights(dwa):
    def weights_of_fit(model, dwa):
        history = fit(compiled(model, dwa), dwa, epochs=4, batch_size=20)
        return np.array([history["easy_weight"], history["hard_weight"]]).T

    model = dict_model()
    initial = model.get_weights()
    expected = weights_of_fit(model, dwa)
    assert np.abs(expected[2:] / expected[0] - 1).max() > 1e-3

    dwa = new_dwa()
    model = ComputeLoss(dwa)
    model(X)
    model.set_weights(initial)
    found = [weights_of_fit(model, dwa)]
    for in_graph in (True, False):
        model, optimizer, dwa = dict_model(), keras.optimizers.SGD(0.05), new_dwa()
        model.set_weights(initial)
        compound = CompoundLoss(LOSSES, dwa)
        found.append(train_loop(model, optimizer, compound, dwa, X, Y, 4, 20, in_graph))
    for weights in found:
        np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_losses_declared_once_serve_compile_and_calls_before(dwa, compound):
    model = dict_model()
    model.compound = compound
    compiled(model, dwa, loss=compound.losses)
    compound(Y, Y)
    model.evaluate(X, Y, verbose=0)
    compound(Y, Y)
    check_run(fit(model, dwa, validation_split=0.2), dwa)


# Bad input. That of `compile` and `fit` is in `test_wiring.py`.


def new(losses):
    return lambda compound: CompoundLoss(losses, compound.weighting)


def combine(values):
    return lambda compound: compound.combine(values)


@one_backend
@pytest.mark.parametrize(
    ("use", "message"),
    [
        (new({"easy": 0}), "have the names of `weighting`, ['easy', 'hard']. Found {'easy': 0}."),
        (new(["easy", "heavy"]), "Found ['easy', 'heavy']"),
        (new({"easy": "mse", "hard": None}), "needs a loss for every name"),
        (lambda _: CompoundLoss(LOSSES, NAMES), "`weighting` must be a LossWeighting. Found ["),
        (lambda compound: compound(Y, [X]), "or two tensors. Found a list for `y_pred`"),
        (lambda compound: compound(Y, {"easy": 0}), "`y_pred` must have the outputs ['easy', 'ha"),
        (lambda compound: compound(Y, Y, {"more": 1.0}), "names ['easy', 'hard']. Found ['more']"),
        (lambda compound: compound.stateless_call([1], Y, Y), "`weighting.variables`, 2 of them. "),
        (lambda compound: new(NAMES)(compound)(Y, Y), "can only `combine`. Found CompoundLoss(['e"),
        (lambda compound: new(NAMES)(compound).losses, "names but no losses can only `combine`"),
        (combine({"easy": 1.0}), "one term for each of ['easy', 'hard']. Found ['easy']"),
        (combine(3.0), "Found 3.0"),
        (combine({"easy": 1.0, "hard": np.ones(3)}), "scalar. Found the shape (3,) for 'hard'"),
        (combine(np.ones(3)), "(2,), for ['easy', 'hard']. Found the shape (3,)."),
    ],
)
def test_misuse_says_what_was_found_and_records_nothing(dwa, compound, use, message):
    compound.combine({"easy": 1.0, "hard": 2.0})
    with pytest.raises(ValueError, match=re.escape(message)):
        use(compound)
    assert dwa._weights.recorded().tolist() == [1.0, 2.0, 1.0]


@one_backend
def test_name_that_the_logs_would_have_twice_is_hinted_at():
    with pytest.warns(UserWarning, match=r"\['kl_loss_loss'\]. Leave `_loss` out"):
        CompoundLoss(["kl_loss", "size"], LossWeighting(["kl_loss", "size"]))


@one_backend
def test_copy_is_the_original_and_a_pickle_keeps_its_weighting(dwa):
    compound = CompoundLoss({"easy": keras.losses.mean_absolute_error, "hard": "mse"}, dwa)
    assert copy.copy(compound) is copy.deepcopy(compound) is compound
    weighting, again = pickle.loads(pickle.dumps((dwa, compound)))
    assert again.weighting is weighting
    assert repr(again) == repr(compound)
