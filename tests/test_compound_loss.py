"""The compound loss: custom loops, terms that are not outputs, and `compute_loss` under `fit`."""

import copy
import pickle
import re

import keras
import numpy as np
import pytest
from common import (
    BACKEND,
    LOSSES,
    SAMPLES,
    ComputeLoss,
    X,
    Y,
    check_run,
    dict_model,
    floatx,
    joined,
    one_backend,
    train,
)
from loops import train_loop, value_and_gradient

from keras_dwa import CompoundLoss, DynamicWeightAverage, dwa_weights

NAMES = list(LOSSES)


def masked_mae(y_true, y_pred):
    return keras.losses.mean_absolute_error(y_true, y_pred)


def new_dwa():
    return DynamicWeightAverage({"easy": 3.0, "hard": 0.5}, temperature=0.2)


@pytest.fixture
def dwa():
    return new_dwa()


@pytest.fixture
def compound(dwa):
    return CompoundLoss(LOSSES, dwa)


def move(dwa):
    """Weights that differ from the base weights."""
    dwa.step({"easy": 2.0, "hard": 4.0})
    return dwa.step({"easy": 1.0, "hard": 3.0})


def moved_by(*epochs):
    """The weights after epochs with these (easy, hard) averages."""
    dwa = new_dwa()
    return [dwa.step(dict(zip(NAMES, losses, strict=True))) for losses in epochs][-1]


def assert_close(weights, expected):
    for name, weight in expected.items():
        np.testing.assert_allclose(weights[name], weight, rtol=1e-5)


# The value and its gradient; `test_assign.py` has that of `combine`.


def test_call_and_combine_give_the_weighted_sum(dwa, compound):
    weights = move(dwa)
    y_pred = {"easy": Y["easy"] + 2, "hard": Y["hard"] - 3, "features without a loss": X}
    expected = weights["easy"] * 4 + weights["hard"] * 3
    np.testing.assert_allclose(float(compound(Y, y_pred)), expected, rtol=1e-6)
    terms = {"hard": 7.0, "easy": keras.ops.convert_to_tensor(-2.0)}
    expected = weights["easy"] * -2 + weights["hard"] * 7
    np.testing.assert_allclose(float(compound.combine(terms)), expected, rtol=1e-6)


def test_no_gradient_flows_into_the_weights_or_out_of_the_record(dwa, compound):
    values = [keras.ops.convert_to_numpy(variable) for variable in dwa.variables]

    def of_weight(weight):
        y_pred = {name: target + 1 for name, target in Y.items()}
        weights = keras.ops.stack([weight, weight / 2])
        loss, _ = compound.stateless_call([weights, *values[1:]], Y, y_pred)
        return loss + 0 * weight

    def of_prediction(shift):
        y_pred = {name: keras.ops.convert_to_tensor(Y[name]) + shift for name in Y}
        _, (*_, record) = compound.stateless_call(values, Y, y_pred)
        return keras.ops.sum(record) + 0 * shift

    for function, expected in ((of_weight, 1.0 + 0.5), (of_prediction, 3 * SAMPLES + 3)):
        value, gradient = value_and_gradient(function, np.float32(1.0))
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert gradient == 0


def test_sample_weights_by_name_or_for_all(compound):
    y_pred = {name: np.zeros_like(target) for name, target in Y.items()}
    halves = (np.arange(SAMPLES) % 2).astype("float32")
    mse = (Y["easy"] ** 2).mean(axis=1)
    mae = np.abs(Y["hard"]).mean(axis=1)
    of_both = 3 * (halves * mse).mean() + 0.5 * (halves * mae).mean()
    for sample_weight, expected in (
        ({"easy": halves}, 3 * (halves * mse).mean() + 0.5 * mae.mean()),
        ({"easy": halves, "hard": halves}, of_both),
        (halves, of_both),
    ):
        np.testing.assert_allclose(float(compound(Y, y_pred, sample_weight)), expected, rtol=1e-5)


def test_masks_and_ranks_are_as_in_compile(dwa):
    def own_mse(y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)

    tokens = np.arange(SAMPLES * 5).reshape(SAMPLES, 5) % 7  # 0 is masked.
    inputs = keras.Input((5,), dtype="int32")
    embedded = keras.layers.Embedding(7, 3, mask_zero=True)(inputs)
    scaled = keras.layers.Rescaling(0.1)(inputs)
    outputs = {"easy": keras.layers.Dense(2)(embedded), "hard": keras.layers.Dense(1)(scaled)}
    model = keras.Model(inputs, outputs)
    targets = {"easy": np.sin([tokens] * 2).transpose(1, 2, 0), "hard": Y["easy"][:, 0]}
    losses = {"easy": keras.losses.Huber(), "hard": own_mse}
    model.compile("sgd", losses, loss_weights=dwa.loss_weights)
    expected = model.evaluate(tokens, targets, batch_size=SAMPLES, verbose=0)[0]
    loss = CompoundLoss(losses, dwa)(targets, model(tokens))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(loss), expected, rtol=1e-6)


def test_low_precision_terms_are_combined_in_float32(compound):
    values = {name: keras.ops.cast(1.0, "float16") for name in LOSSES}
    predictions = {name: keras.ops.cast(Y[name], "bfloat16") for name in Y}
    for loss in (compound.combine(values), compound(Y, predictions)):
        assert keras.backend.standardize_dtype(loss.dtype) == "float32"


@pytest.mark.parametrize(
    ("default", "dtype", "epochs", "samples", "tolerance"),
    [
        ("float16", "float32", (2e5, 1e5), 100_000, 1e-3),  # Beyond float16.
        ("float64", "float64", (3 / 7, 2 / 7), 1, 1e-12),
    ],
)
def test_losses_are_recorded_in_float32_or_wider(default, dtype, epochs, samples, tolerance):
    with floatx(default):
        dwa = DynamicWeightAverage(NAMES)
        compound = CompoundLoss(NAMES, dwa)
        for easy in epochs:
            terms = {"easy": np.array(easy, dtype), "hard": np.array(0.1, dtype)}
            loss = keras.ops.convert_to_numpy(compound.combine(terms, samples))
            np.testing.assert_allclose(loss, easy + 0.1, rtol=100 * np.finfo(dtype).eps)
            weights = dwa.step()
        expected = dwa_weights([epochs[1], 0.1], [epochs[0], 0.1])
        np.testing.assert_allclose(list(weights.values()), expected, rtol=tolerance)


# The record, and `step`.


def test_weights_move_by_the_averages_of_epochs_of_any_number_of_batches(dwa, compound):
    for batches in ((4.0, 2.0), (1.0,)):
        for easy in batches:
            compound.combine({"easy": easy, "hard": 2.0})
        weights = dwa.step()
    assert weights == moved_by((3.0, 2.0), (1.0, 2.0))


def test_calls_are_averaged_over_samples(dwa, compound):
    for size, error in ((10, 1.0), (30, 2.0)):
        y_true = {name: target[:size] for name, target in Y.items()}
        compound(y_true, {name: target + error for name, target in y_true.items()})
    dwa.step()
    weights = dwa.step({"easy": 1.0, "hard": 1.0})
    averages = (10 + 30 * 4) / 40, (10 + 30 * 2) / 40
    assert_close(weights, moved_by(averages, (1.0, 1.0)))


@one_backend
def test_variables_are_the_weights_and_one_record_for_all_compound_losses(dwa, compound):
    CompoundLoss(LOSSES, dwa)
    variables = [(variable.name, variable.shape) for variable in dwa.variables]
    assert variables == [("loss_weights", (2,)), ("record", (2, 3))]


def test_step_with_nothing_recorded_does_nothing(dwa, compound):
    before = move(dwa)
    assert dwa.step() == before
    compound.combine({"easy": 0.5, "hard": 1.5})
    moved = dwa.step()
    assert_close(moved, {"easy": 3.0, "hard": 0.5})
    assert dwa.step() == moved


def test_reset_forgets_what_was_recorded(dwa, compound):
    move(dwa)
    compound.combine({"easy": 0.5, "hard": 100.0})
    dwa.reset()
    assert dwa.step() == {"easy": 3.0, "hard": 0.5}
    assert dwa._weights.state.epochs == 0


def test_nan_term_holds_the_weights_for_the_epoch(dwa, compound):
    before = move(dwa)
    compound.combine({"easy": 0.5, "hard": float("nan")})
    compound.combine({"easy": 0.5, "hard": 1.0})
    with pytest.warns(UserWarning, match=r"'hard' \(nan\) is not finite"):
        assert dwa.step() == before
    compound.combine({"easy": 0.5, "hard": 1.5})
    assert_close(dwa.step(), {"easy": 3.0})


def test_stateless_call_is_as_a_call_and_leaves_the_record_alone(dwa, compound):
    weights = move(dwa)
    values = [variable.value for variable in dwa.variables]
    loss, new_values = compound.stateless_call(values, Y, {name: Y[name] + 1 for name in Y})
    np.testing.assert_allclose(float(loss), weights["easy"] + weights["hard"], rtol=1e-6)
    np.testing.assert_allclose(new_values[-1], [[SAMPLES] * 3, [1] * 3], rtol=1e-6)
    assert dwa._weights.recorded() is None
    assert {name: float(weight) for name, weight in dwa.loss_weights.items()} == weights


def test_compiled_stateless_combine_is_as_combine(dwa, compound):
    terms = {"easy": np.float32(7.0), "hard": np.float32(2.0)}
    move(dwa)
    if BACKEND == "jax":
        from jax import jit as compiled
    elif BACKEND == "tensorflow":
        from tensorflow import function as compiled
    else:
        from torch import compile as compiled

        terms = {name: keras.ops.convert_to_tensor(term) for name, term in terms.items()}
    step = compiled(compound.stateless_combine)
    variables = [keras.ops.convert_to_tensor(variable) for variable in dwa.variables]
    for _ in range(3):
        loss, variables = step(variables, terms)
    assert dwa._weights.recorded() is None
    np.testing.assert_allclose(keras.ops.convert_to_numpy(variables[-1]), [[21, 6, 3]] * 2)
    np.testing.assert_allclose(float(loss), float(compound.combine(terms)), rtol=1e-6)


@one_backend
def test_step_after_calls_that_left_no_record_warns_once(dwa, compound):
    values = [variable.value for variable in dwa.variables]
    compound.stateless_combine(values, {"easy": 1.0, "hard": 1.0})
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
    dwa.reset()
    assert dwa.step() == {"easy": 3.0, "hard": 0.5}


@one_backend
def test_recording_under_jax_grad_without_jit(dwa, compound):
    import jax

    for shift in (1.0, 2.0):
        jax.grad(lambda shift: compound(Y, {name: Y[name] + shift for name in Y}))(shift)
    np.testing.assert_allclose(dwa._weights.recorded()[0], [2.5, 1.5, 80], rtol=1e-6)


# `fit`, and custom loops.


def compiled(model, **arguments):
    model.compile(keras.optimizers.SGD(0.05), **arguments)
    return model


def fit(model, dwa=None, epochs=3, **arguments):
    arguments = {"batch_size": 8, "verbose": 0, "callbacks": [dwa] if dwa else [], **arguments}
    return model.fit(X, Y, epochs=epochs, **arguments).history


@pytest.mark.every_mode
def test_compute_loss_under_fit(dwa, mode):
    history = fit(compiled(ComputeLoss(dwa), **mode), dwa, validation_split=0.2)
    check_run(history, dwa)
    assert "val_base_loss" in history


def test_model_built_evaluated_and_fitted_without_the_callback_first(dwa):
    model = ComputeLoss(dwa)
    model(X)
    compiled(model).evaluate(X, Y, batch_size=8, verbose=0)
    for callback in (None, dwa):
        history = fit(model, callback, validation_split=0.2)
    check_run(history, dwa)


def test_train_on_batch_with_a_compound_loss(dwa):
    model = compiled(ComputeLoss(dwa))
    dwa.set_model(model)
    for _ in range(4):
        weights = dwa.step()
        model.reset_metrics()  # As Keras 3.10 does not yet.
        logs = model.train_on_batch(X, Y, return_dict=True)
        weighted = sum(weights[name] * logs[f"{name}_loss"] for name in weights)
        np.testing.assert_allclose(logs["loss"], weighted, rtol=1e-5)
        dwa.step()
    assert abs(weights["easy"] / 3 - 1) > 1e-3


def test_terms_under_fit_count_by_their_samples():
    class Autoencoder(ComputeLoss):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            reconstruction = keras.ops.mean(keras.ops.square(x[:, :2] - y_pred["hard"]))
            spread = keras.ops.mean(keras.ops.square(y_pred["easy"]))
            samples = keras.ops.shape(x)[0]
            return self.compound.combine({"easy": reconstruction, "hard": spread}, samples)

    dwa = DynamicWeightAverage(NAMES, temperature=0.2)
    # The last batch of an epoch is smaller.
    check_run(fit(compiled(Autoencoder(dwa)), dwa, batch_size=32), dwa)


def test_compile_compute_loss_and_custom_loops_give_the_same_weights():
    initial = dict_model().get_weights()

    def start(make_model=lambda dwa: dict_model()):
        dwa = new_dwa()
        model = make_model(dwa)
        model(X)
        model.set_weights(initial)
        return model, CompoundLoss(LOSSES, dwa), dwa

    def weights_of_fit(model, dwa):
        history = fit(model, dwa, epochs=4, batch_size=20, shuffle=False)
        return np.array([history["easy_weight"], history["hard_weight"]]).T

    model, compound, dwa = start()
    compiled(model, loss=compound.losses, loss_weights=compound.loss_weights)
    expected = weights_of_fit(model, dwa)
    assert np.abs(expected[2:] / expected[0] - 1).max() > 1e-3
    model, _, dwa = start(ComputeLoss)
    np.testing.assert_allclose(weights_of_fit(compiled(model), dwa), expected, rtol=1e-5)
    for in_graph in (True, False):
        model, compound, dwa = start()
        optimizer = keras.optimizers.SGD(0.05)
        by_loop = train_loop(model, optimizer, compound, dwa, X, Y, 4, 20, in_graph)
        np.testing.assert_allclose(by_loop, expected, rtol=1e-5)


@pytest.mark.parametrize("is_attribute", [True, False])
def test_losses_declared_once_serve_compile_and_a_call_between(dwa, compound, is_attribute):
    model = dict_model()
    if is_attribute:
        model.compound = compound
    compiled(model, loss=compound.losses, loss_weights=dwa.loss_weights)
    compound(Y, Y)
    logs = model.evaluate(X, Y, batch_size=SAMPLES, verbose=0, return_dict=True)
    weighted = 3 * logs["easy_loss"] + 0.5 * logs["hard_loss"]
    np.testing.assert_allclose(logs["loss"], weighted, rtol=1e-5)
    histories = []
    for _ in range(2):
        histories.append(train(model, dwa, loss=compound.losses, epochs=2, validation_split=0.2))
        compound(Y, Y)
    check_run(joined(*histories), dwa)
    assert compound.losses == LOSSES
    assert compound.loss_weights == dwa.loss_weights


@pytest.mark.skipif(BACKEND != "torch", reason="TorchJD runs on torch")
def test_combine_and_step_are_as_torchjd():
    import torch
    from torchjd.scalarization import DWA

    random, names = np.random.default_rng(0), list("abc")
    dwa = DynamicWeightAverage(names, temperature=0.5)
    compound, reference = CompoundLoss(names, dwa), DWA(temperature=0.5)
    for batches in (2, 3, 0, 1, 2):
        for _ in range(batches):
            values = torch.tensor([1, -1, 1] * random.uniform(0.5, 2, 3), requires_grad=True)
            terms = dict(zip(names, values.unbind(), strict=True))
            (ours,) = torch.autograd.grad(compound.combine(terms), values)
            (expected,) = torch.autograd.grad(reference(values), values)
            np.testing.assert_allclose(ours, expected, rtol=1e-5)
        dwa.step()
        reference.step()


# Bad input; `test_wiring.py` has that of `compile` and `fit`.


def new(losses):
    return lambda compound: CompoundLoss(losses, compound._weighting)


def combine(values):
    return lambda compound: compound.combine(values)


@one_backend
@pytest.mark.parametrize(
    ("use", "message"),
    [
        (new({"easy": 0}), "have the names of `weighting`, ['easy', 'hard']. Found {'easy': 0}."),
        (new(["easy", "heavy"]), "Found ['easy', 'heavy']"),
        (new(["easy", "hard", "easy"]), "Found ['easy', 'hard', 'easy']"),
        (new("easy"), "Found 'easy'"),
        (new(None), "Found None"),
        (new({"easy": "mse", "hard": None}), "needs a loss for every name"),
        (new({"easy": "mse", "hard": "nonsense"}), "nonsense"),
        (lambda _: CompoundLoss(LOSSES, NAMES), "`weighting` must be a LossWeighting. Found ["),
        (lambda compound: compound(Y, {"easy": 0}), "`y_pred` must have the outputs ['easy', 'ha"),
        (lambda compound: compound({"easy": 0}, Y), "Found ['easy']"),
        (lambda compound: compound(Y, Y, {"more": 1.0}), "names ['easy', 'hard']. Found ['more']"),
        (lambda compound: compound.stateless_call([1], Y, Y), "`weighting.variables`, 2 of them. "),
        (lambda compound: new(NAMES)(compound)(Y, Y), "can only `combine`. Found CompoundLoss(['e"),
        (lambda compound: new(NAMES)(compound).losses, "names only and can only `combine`"),
        (combine({"easy": 1.0}), "one term for each of ['easy', 'hard']. Found ['easy']"),
        (combine({"easy": 1.0, "hard": 1.0, "more": 1.0}), "Found ['easy', 'hard', 'more']"),
        (combine(3.0), "Found 3.0"),
        (combine({"easy": 1.0, "hard": np.ones(3)}), "scalar. Found the shape (3,) for 'hard'"),
        (combine(np.ones(3)), "(2,), for ['easy', 'hard']. Found the shape (3,)."),
        (combine(np.ones((2, 1))), "Found the shape (2, 1)"),
    ],
)
def test_misuse_says_what_was_found_and_records_nothing(dwa, compound, use, message):
    for _ in range(2):
        compound.combine({"easy": 1.0, "hard": 2.0})
        with pytest.raises(ValueError, match=re.escape(message)):
            use(compound)
        assert dwa._weights.recorded().tolist() == [[1.0, 2.0, 1.0]] * 2
        dwa.step()


def test_copy_is_the_original_and_a_pickle_keeps_its_weighting():
    weighting = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
    compound = CompoundLoss({"easy": masked_mae, "hard": "mse"}, weighting)
    assert copy.copy(compound) is copy.deepcopy(compound) is compound
    for each in (compound, CompoundLoss(["easy", "hard"], weighting)):
        other, again = pickle.loads(pickle.dumps((weighting, each)))
        assert again.weighting is other
        assert repr(again) == repr(each)


@one_backend
def test_repr_shows_losses_and_callback(compound):
    assert repr(compound) == (
        "CompoundLoss({'easy': 'mse', 'hard': 'mae'}, "
        "DynamicWeightAverage({'easy': 3.0, 'hard': 0.5}, temperature=0.2, "
        "weights={'easy': 3.0, 'hard': 0.5}))"
    )
