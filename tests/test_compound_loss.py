"""The compound loss: custom loops, terms that are not outputs, and `compute_loss` under `fit`."""

import re
from contextlib import nullcontext

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
    heads,
    train,
)
from loops import train_loop, value_and_gradient

from keras_dwa import CompoundLoss, DynamicWeightAverage, dwa_weights


@pytest.fixture
def dwa():
    return DynamicWeightAverage({"easy": 3.0, "hard": 0.5}, temperature=0.2)


@pytest.fixture
def compound(dwa):
    return CompoundLoss(LOSSES, dwa)


def move(dwa):
    """Weights that differ from the base weights."""
    dwa.step({"easy": 2.0, "hard": 4.0})
    return dwa.step({"easy": 1.0, "hard": 3.0})


# The value and its gradient.


def test_call_is_the_weighted_sum_of_the_losses(dwa, compound):
    weights = move(dwa)
    y_pred = {"easy": Y["easy"] + 2, "hard": Y["hard"] - 3}
    expected = weights["easy"] * 4 + weights["hard"] * 3
    np.testing.assert_allclose(float(compound(Y, y_pred)), expected, rtol=1e-6)


def test_combine_is_the_weighted_sum_of_the_terms(dwa, compound):
    weights = move(dwa)
    terms = {"hard": 7.0, "easy": keras.ops.convert_to_tensor(-2.0)}
    expected = weights["easy"] * -2 + weights["hard"] * 7
    np.testing.assert_allclose(float(compound.combine(terms)), expected, rtol=1e-6)


@pytest.mark.parametrize("compiled", [True, False])
def test_gradient_is_the_weighted_gradient(dwa, compound, compiled):
    weights = move(dwa)

    def loss(point):
        return compound.combine({"easy": point[0] ** 2, "hard": 5 * point[1]})

    point = np.array([3.0, 4.0], "float32")
    value, gradient = value_and_gradient(loss, point, compiled)
    expected = [weights["easy"] * 6, weights["hard"] * 5]
    np.testing.assert_allclose(value, weights["easy"] * 9 + weights["hard"] * 20, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_no_gradient_flows_into_the_weights_or_out_of_the_record(dwa, compound):
    values = [keras.ops.convert_to_numpy(variable) for variable in dwa.variables]

    def of_weight(weight):
        y_pred = {name: target + 1 for name, target in Y.items()}
        weights = weight * np.array([1.0, 0.5], "float32")
        loss, _ = compound.stateless_call([weights, *values[1:]], Y, y_pred)
        return loss + 0 * weight

    def of_prediction(shift):
        y_pred = {name: keras.ops.convert_to_tensor(Y[name]) + shift for name in Y}
        _, (*_, record) = compound.stateless_call(values, Y, y_pred)
        return keras.ops.sum(record) + 0 * shift

    for function, expected in ((of_weight, 1.0 + 0.5), (of_prediction, 3 * SAMPLES)):
        value, gradient = value_and_gradient(function, np.float32(1.0))
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert gradient == 0


def test_sample_weights_by_name_or_for_all(dwa, compound):
    y_pred = {name: np.zeros_like(target) for name, target in Y.items()}
    halves = (np.arange(SAMPLES) % 2).astype("float32")
    mse = (Y["easy"] ** 2).mean(axis=1)
    mae = np.abs(Y["hard"]).mean(axis=1)
    for sample_weight, expected in (
        ({"easy": halves}, 3 * (halves * mse).mean() + 0.5 * mae.mean()),
        (halves, 3 * (halves * mse).mean() + 0.5 * (halves * mae).mean()),
    ):
        np.testing.assert_allclose(float(compound(Y, y_pred, sample_weight)), expected, rtol=1e-5)


def own_mse(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)


@pytest.mark.parametrize("losses", [LOSSES, {"easy": own_mse, "hard": keras.losses.Huber()}])
def test_masks_are_as_in_compile(dwa, losses):
    tokens = np.arange(SAMPLES * 5).reshape(SAMPLES, 5) % 7  # 0 is masked.
    inputs = keras.Input((5,), dtype="int32")
    embedded = keras.layers.Embedding(7, 3, mask_zero=True)(inputs)
    outputs = {"easy": keras.layers.Dense(1)(embedded), "hard": keras.layers.Dense(2)(embedded)}
    model = keras.Model(inputs, outputs)
    targets = {"easy": tokens[..., None] % 2, "hard": np.sin([tokens] * 2).transpose(1, 2, 0)}
    check_as_in_compile(model, tokens, targets, losses, dwa)


def test_ranks_are_as_in_compile(dwa):
    targets = {"easy": Y["easy"][:, 0], "hard": Y["hard"]}
    check_as_in_compile(dict_model(), X, targets, {"easy": own_mse, "hard": "mae"}, dwa)


def check_as_in_compile(model, x, targets, losses, dwa):
    model.compile("sgd", losses, loss_weights=dwa.loss_weights)
    expected = model.evaluate(x, targets, batch_size=SAMPLES, verbose=0)[0]
    loss = CompoundLoss(losses, dwa)(targets, model(x))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(loss), expected, rtol=1e-6)


def test_low_precision_terms_are_combined_in_float32(dwa, compound):
    values = {name: keras.ops.cast(1.0, "float16") for name in LOSSES}
    loss = compound.combine(values)
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    with_output = compound(Y, {name: keras.ops.cast(Y[name], "bfloat16") for name in Y})
    assert keras.backend.standardize_dtype(with_output.dtype) == "float32"


def test_losses_and_samples_beyond_float16_are_recorded_in_float32():
    with floatx("float16"):
        dwa = DynamicWeightAverage(["easy", "hard"])
        compound = CompoundLoss(list(LOSSES), dwa)
        for easy in (2e5, 1e5):
            terms = {
                "easy": keras.ops.cast(easy, "float32"),
                "hard": keras.ops.cast(1.0, "float32"),
            }
            compound.combine(terms, samples=100_000)
            weights = dwa.step()
        expected = dwa_weights([1e5, 1.0], [2e5, 1.0])
        np.testing.assert_allclose(list(weights.values()), expected, rtol=1e-3)


def test_losses_are_combined_and_recorded_in_float64_where_it_is_the_default():
    with floatx("float64"):
        dwa = DynamicWeightAverage(["easy", "hard"])
        compound = CompoundLoss(list(LOSSES), dwa)
        for easy in (3.0, 2.0):
            terms = {"easy": np.float64(easy / 7), "hard": np.float64(0.1)}
            loss = compound.combine(terms)
            np.testing.assert_allclose(keras.ops.convert_to_numpy(loss), easy / 7 + 0.1, rtol=1e-14)
            weights = dwa.step()
        expected = dwa_weights([2.0, 1.0], [3.0, 1.0])
        np.testing.assert_allclose(list(weights.values()), expected, rtol=1e-12)


def test_outputs_without_a_loss_are_left_aside(compound):
    y_pred = {**Y, "features": X}
    assert float(compound(Y, y_pred)) == 0.0


# The record, and `step`.


def test_weights_move_by_the_epochs_average_not_its_last_batch(dwa):
    compound = CompoundLoss(["easy", "hard"], dwa)
    for first, second in ((4.0, 2.0), (1.0, 1.0)):
        compound.combine({"easy": first, "hard": 2.0})
        compound.combine({"easy": second, "hard": 2.0})
        weights = dwa.step()
    reference = DynamicWeightAverage(dwa.outputs, temperature=0.2)
    reference.step({"easy": 3.0, "hard": 2.0})
    assert weights == reference.step({"easy": 1.0, "hard": 2.0})


def test_calls_are_averaged_over_samples(dwa, compound):
    for size, error in ((10, 1.0), (30, 2.0)):
        y_true = {name: target[:size] for name, target in Y.items()}
        compound(y_true, {name: target + error for name, target in y_true.items()})
    dwa.step()
    weights = dwa.step({"easy": 1.0, "hard": 1.0})
    reference = DynamicWeightAverage(dwa.outputs, temperature=0.2)
    reference.step({"easy": (10 + 30 * 4) / 40, "hard": (10 + 30 * 2) / 40})
    expected = reference.step({"easy": 1.0, "hard": 1.0})
    np.testing.assert_allclose(list(weights.values()), list(expected.values()), rtol=1e-5)


def test_variables_are_the_weights_and_the_record(dwa, compound):
    variables = [(variable.name, variable.shape) for variable in dwa.variables]
    assert variables == [("loss_weights", (2,)), ("record", (3,))]


def test_epochs_may_differ_in_their_number_of_batches(dwa):
    compound = CompoundLoss(list(LOSSES), dwa)
    for batches in (1, 3):
        for _ in range(batches):
            compound.combine({"easy": 2.0 / batches, "hard": 1.0})
        weights = dwa.step()
    expected = dwa_weights([2 / 3, 1.0], [2.0, 1.0], 0.2) * [3.0, 0.5]
    np.testing.assert_allclose(list(weights.values()), expected, rtol=1e-6)


def test_step_with_nothing_recorded_does_nothing(dwa, compound):
    before = move(dwa)
    assert dwa.step() == before
    compound.combine({"easy": 0.5, "hard": 1.5})
    moved = dwa.step()
    np.testing.assert_allclose([moved["easy"], moved["hard"]], [3.0, 0.5], rtol=1e-6)
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
    np.testing.assert_allclose(dwa.step()["easy"], 3.0, rtol=1e-6)


def test_stateless_call_is_as_a_call_and_leaves_the_record_alone(dwa, compound):
    weights = move(dwa)
    values = [variable.value for variable in dwa.variables]
    loss, new_values = compound.stateless_call(values, Y, {name: Y[name] + 1 for name in Y})
    np.testing.assert_allclose(float(loss), weights["easy"] + weights["hard"], rtol=1e-6)
    assert float(new_values[-1][-1]) == SAMPLES
    assert dwa._weights.recorded_averages() is None
    assert {name: float(weight) for name, weight in dwa.loss_weights.items()} == weights


@pytest.mark.parametrize("compiled", [True, False])
def test_stateless_combine_is_as_combine(dwa, compound, compiled):
    terms = {"easy": np.float32(7.0), "hard": np.float32(2.0)}
    move(dwa)
    step = compound.stateless_combine
    if compiled and BACKEND == "jax":
        import jax

        step = jax.jit(step)
    if compiled and BACKEND == "tensorflow":
        import tensorflow as tf

        step = tf.function(step)
    if compiled and BACKEND == "torch":
        import torch

        step = torch.compile(step)
        terms = {name: torch.tensor(term) for name, term in terms.items()}
    variables = [keras.ops.convert_to_tensor(variable) for variable in dwa.variables]
    for _ in range(3):
        loss, variables = step(variables, terms)
    assert dwa._weights.recorded_averages() is None
    np.testing.assert_allclose(keras.ops.convert_to_numpy(variables[-1]), [21, 6, 3])
    np.testing.assert_allclose(float(loss), float(compound.combine(terms)), rtol=1e-6)


# `fit`, and custom loops.


@pytest.mark.every_mode
def test_compute_loss_under_fit(dwa, mode):
    model = ComputeLoss(dwa)
    model.compile(keras.optimizers.SGD(0.05), **mode)
    history = model.fit(
        X, Y, batch_size=8, epochs=5, verbose=0, validation_split=0.2, callbacks=[dwa]
    ).history
    check_run(history, dwa)
    assert "val_base_loss" in history


def test_model_with_a_compound_loss_built_and_evaluated_before_fit(dwa, mode):
    model = ComputeLoss(dwa)
    model(X)
    model.compile(keras.optimizers.SGD(0.05), **mode)
    model.evaluate(X, Y, batch_size=8, verbose=0)
    history = model.fit(
        X, Y, batch_size=8, epochs=4, verbose=0, validation_split=0.2, callbacks=[dwa]
    ).history
    check_run(history, dwa)


def test_model_fitted_and_evaluated_without_the_callback_first(dwa, mode):
    model = ComputeLoss(dwa)
    model.compile(keras.optimizers.SGD(0.05), **mode)
    fit = {"batch_size": 8, "epochs": 3, "verbose": 0, "validation_split": 0.2}
    model.fit(X, Y, **fit)
    check_run(model.fit(X, Y, callbacks=[dwa], **fit).history, dwa)


def test_return_to_a_first_model_starts_afresh(dwa):
    first, second = ComputeLoss(dwa), ComputeLoss(dwa)
    for model in (first, second, first):
        returns = model is first and model.compiled
        if not returns:
            model.compile(keras.optimizers.SGD(0.05))
        fit = {"batch_size": 8, "epochs": 4, "verbose": 0, "callbacks": [dwa]}
        with pytest.warns(UserWarning, match="comes back") if returns else nullcontext():
            history = model.fit(X, Y, **fit).history
        check_run(history, dwa)


def test_train_on_batch_with_a_compound_loss(dwa):
    model = ComputeLoss(dwa)
    model.compile(keras.optimizers.SGD(0.05))
    dwa.set_model(model)
    for _ in range(4):
        weights = dwa.step()
        model.reset_metrics()  # As Keras 3.10 does not yet.
        logs = model.train_on_batch(X, Y, return_dict=True)
        weighted = sum(weights[name] * logs[f"{name}_loss"] for name in weights)
        np.testing.assert_allclose(logs["loss"], weighted, rtol=1e-5)
        dwa.step()
    assert abs(weights["easy"] / 3 - 1) > 1e-3


def test_combine_under_fit(mode):
    dwa = DynamicWeightAverage(["reconstruction", "spread"], temperature=0.2)

    class Autoencoder(keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder = keras.layers.Dense(2, activation="tanh")
            self.decoder = keras.layers.Dense(4)
            self.compound = CompoundLoss(["reconstruction", "spread"], dwa)

        def call(self, inputs):
            code = self.encoder(inputs)
            return {"code": code, "image": self.decoder(code)}

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return self.compound.combine(
                {
                    "reconstruction": keras.ops.mean(keras.ops.square(x - y_pred["image"])),
                    "spread": keras.ops.mean(keras.ops.square(y_pred["code"])),
                },
                samples=keras.ops.shape(x)[0],
            )

    model = Autoencoder()
    model.compile(keras.optimizers.SGD(0.05), **mode)
    # The last batch of an epoch is smaller.
    check_run(model.fit(X, batch_size=32, epochs=4, verbose=0, callbacks=[dwa]).history, dwa)


@pytest.mark.parametrize("compiled", [True, False])
def test_compile_compute_loss_and_custom_loop_give_the_same_weights(compiled):
    def start():
        keras.utils.set_random_seed(0)
        dwa = DynamicWeightAverage({"easy": 3.0, "hard": 0.5}, temperature=0.2)
        return dwa, keras.optimizers.SGD(0.05)

    fit = {"batch_size": 20, "epochs": 4, "shuffle": False, "verbose": 0}
    mode = {"run_eagerly": not compiled}

    dwa, optimizer = start()
    compound = CompoundLoss(LOSSES, dwa)
    model = dict_model()
    initial = model.get_weights()
    model.compile(optimizer, compound.losses, loss_weights=compound.loss_weights, **mode)
    history = model.fit(X, Y, callbacks=[dwa], **fit).history
    by_compile = np.array([history["easy_weight"], history["hard_weight"]]).T

    dwa, optimizer = start()
    model = ComputeLoss(dwa)
    model(X)
    model.set_weights(initial)
    model.compile(optimizer, **mode)
    history = model.fit(X, Y, callbacks=[dwa], **fit).history
    by_compute_loss = np.array([history["easy_weight"], history["hard_weight"]]).T

    dwa, optimizer = start()
    model = dict_model()
    model.set_weights(initial)
    compound = CompoundLoss(LOSSES, dwa)
    by_loop = train_loop(model, optimizer, compound, dwa, X, Y, 4, 20, compiled)

    assert np.abs(by_compile[2:] / by_compile[0] - 1).max() > 1e-3
    np.testing.assert_allclose(by_compute_loss, by_compile, rtol=1e-5)
    np.testing.assert_allclose(by_loop, by_compile, rtol=1e-5)


def test_losses_declared_once_serve_compile_and_a_call_between(dwa, compound):
    model = dict_model()
    first = train(model, dwa, loss=compound.losses, validation_split=0.2)
    compound(Y, Y)
    second = train(model, dwa, loss=compound.losses, validation_split=0.2)
    check_run({key: first[key] + second[key] for key in first}, dwa)
    assert compound.losses == LOSSES
    assert compound.loss_weights == dwa.loss_weights


def test_saved_weights_carry_the_state(dwa, tmp_path):
    model = ComputeLoss(dwa)
    model.compile(keras.optimizers.SGD(0.05))
    first = model.fit(X, Y, batch_size=8, epochs=3, verbose=0, callbacks=[dwa]).history
    model.save_weights(tmp_path / "state.weights.h5")

    resumed = DynamicWeightAverage(dwa.outputs, temperature=0.2)
    other = ComputeLoss(resumed)
    other(X)
    other.compile(keras.optimizers.SGD(0.05))
    resumed.set_model(other)
    other.load_weights(tmp_path / "state.weights.h5")
    second = other.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[resumed]).history
    check_run({key: first[key] + second[key] for key in first}, dwa)


@keras.saving.register_keras_serializable("tests")
class OwnCallback(ComputeLoss):
    """A model that makes its callback itself, so that `load_model` can make it anew."""

    def __init__(self, **kwargs):
        self.dwa = DynamicWeightAverage({"easy": 3.0, "hard": 0.5}, temperature=0.2)
        super().__init__(self.dwa, **kwargs)

    def get_config(self):
        return {}


def test_saved_model_goes_on_with_the_state(tmp_path):
    def fit(model):
        callbacks = [model.dwa]
        return model.fit(
            X, Y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=callbacks
        ).history

    model = OwnCallback()
    model.compile(keras.optimizers.Adam(0.01))
    fit(model)
    model.save(tmp_path / "model.keras")
    expected = fit(model)

    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.dwa.set_model(loaded)
    loaded.load_weights(tmp_path / "model.keras")
    for key, values in fit(loaded).items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="TorchJD runs on torch")
@pytest.mark.parametrize("seed", range(5))
def test_combine_and_step_are_as_torchjd(seed):
    import torch
    from torchjd.scalarization import DWA

    random = np.random.default_rng(seed)
    names = [f"task_{k}" for k in range(random.integers(2, 6))]
    sign = random.choice([-1, 1], size=len(names))
    dwa = DynamicWeightAverage(names, temperature=0.5)
    compound, reference = CompoundLoss(names, dwa), DWA(temperature=0.5)
    for epoch in range(7):
        if epoch == 4:
            dwa.reset()
            reference.reset()
        for _ in range(random.integers(0, 4)):
            values = torch.tensor(sign * random.uniform(0.5, 2, len(names)), requires_grad=True)
            terms = dict(zip(names, values.unbind(), strict=True))
            (ours,) = torch.autograd.grad(compound.combine(terms), values)
            (expected,) = torch.autograd.grad(reference(values), values)
            np.testing.assert_allclose(ours, expected, rtol=1e-5)
        dwa.step()
        reference.step()


# Bad input.


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            {"easy": "mse"},
            "must have the names of `weighting`, ['easy', 'hard']. Found {'easy': 'mse'}",
        ),
        (["easy", "heavy"], "Found ['easy', 'heavy']"),
        (["easy", "hard", "easy"], "Found ['easy', 'hard', 'easy']"),
        ("easy", "Found 'easy'"),
        (None, "Found None"),
        ({"easy": "mse", "hard": None}, "needs a loss for every name"),
        ({"easy": "mse", "hard": "nonsense"}, "nonsense"),
    ],
)
def test_losses_must_be_losses_for_the_names_of_the_callback(dwa, losses, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CompoundLoss(losses, dwa)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"easy": 1.0}, "one term for each of ['easy', 'hard']. Found ['easy']"),
        ({"easy": 1.0, "hard": 1.0, "more": 1.0}, "Found ['easy', 'hard', 'more']"),
        (3.0, "Found 3.0"),
        ({"easy": 1.0, "hard": np.ones(3)}, "must be a scalar. Found the shape (3,) for 'hard'"),
    ],
)
def test_combine_takes_one_scalar_per_name_within_and_between_epochs(
    dwa, compound, values, message
):
    for _ in range(2):
        compound.combine({"easy": 1.0, "hard": 1.0})
        with pytest.raises(ValueError, match=re.escape(message)):
            compound.combine(values)
        dwa.step()


def test_callback_must_be_one():
    with pytest.raises(ValueError, match=re.escape("`weighting` must be a LossWeighting. Found [")):
        CompoundLoss(LOSSES, ["easy", "hard"])


def test_compound_loss_has_no_config(compound):
    with pytest.raises(ValueError, match=r"Make it anew in the `__init__` of the model"):
        keras.losses.serialize(compound)


def test_calls_take_dicts_with_every_output(compound):
    with pytest.raises(ValueError, match=re.escape("`y_pred` must have the outputs ['easy', 'ha")):
        compound(Y, {"easy": Y["easy"]})
    with pytest.raises(ValueError, match=re.escape("Found ['easy']")):
        compound({"easy": Y["easy"]}, Y)
    with pytest.raises(ValueError, match=re.escape("Found ['more']")):
        compound(Y, Y, {"more": 1.0})
    with pytest.raises(ValueError, match=r"variables` must be the values of .*Found 1"):
        compound.stateless_call([1.0], Y, Y)


def test_names_alone_can_only_combine(dwa):
    compound = CompoundLoss(["easy", "hard"], dwa)
    for use in (lambda: compound(Y, Y), lambda: compound.losses):
        with pytest.raises(ValueError, match="names only and can only `combine`"):
            use()


def test_compound_loss_given_to_compile_says_what_to_write(dwa, compound):
    model = dict_model()
    model.compile("sgd", compound)
    with pytest.raises(ValueError, match=r"loss=compound\.losses, loss_weights=compound\.loss"):
        model.fit(X, Y, verbose=0, callbacks=[dwa])


def test_compound_loss_that_compute_loss_never_calls_is_an_error(dwa, compound):
    class Forgetful(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return keras.ops.mean(y_pred["easy"]) + keras.ops.mean(y_pred["hard"])

    model = Forgetful(*heads())
    model.compile("sgd")
    with pytest.raises(ValueError, match="nor called the compound loss"):
        model.fit(X, Y, verbose=0, callbacks=[dwa])


def test_step_after_calls_that_left_no_record_warns(dwa, compound):
    values = [variable.value for variable in dwa.variables]
    compound.stateless_combine(values, {"easy": 1.0, "hard": 1.0})
    with pytest.warns(
        UserWarning, match=r"nothing recorded.*`stateless_call`.*weighting\.set_model"
    ):
        dwa.step()
    dwa.step()


def test_losses_declared_once_but_compiled_without_the_weights_are_an_error(dwa, compound):
    compound(Y, Y)
    model = dict_model()
    model.compile("sgd", compound.losses)
    with pytest.raises(ValueError, match=r"loss=compound\.losses, loss_weights=compound\.loss_w"):
        model.fit(X, Y, verbose=0, callbacks=[dwa])


@pytest.mark.skipif(BACKEND != "jax", reason="on JAX, a function under jit leaves a tracer behind")
def test_recording_under_jax_jit_is_an_error_that_names_stateless_call(dwa, compound):
    import jax

    jax.jit(lambda y_pred: compound(Y, y_pred))(Y)
    with pytest.raises(ValueError, match="stateless_call"):
        dwa.step()
    dwa.reset()
    assert dwa.step() == {"easy": 3.0, "hard": 0.5}


@pytest.mark.skipif(BACKEND != "jax", reason="how JAX takes gradients without jit")
def test_recording_under_jax_grad_without_jit(dwa, compound):
    import jax

    for shift in (1.0, 2.0):
        jax.grad(lambda shift: compound(Y, {name: Y[name] + shift for name in Y}))(shift)
    np.testing.assert_allclose(dwa._weights.recorded_averages()["hard"], 1.5, rtol=1e-6)


def test_repr_shows_losses_and_callback(compound):
    assert repr(compound) == (
        "CompoundLoss({'easy': 'mse', 'hard': 'mae'}, "
        "DynamicWeightAverage({'easy': 3.0, 'hard': 0.5}, temperature=0.2))"
    )
