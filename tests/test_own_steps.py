"""Models with a custom step or trackers, as in Keras's guides and in public code."""

import keras
import numpy as np
import pytest
from common import BACKEND, Lambda, TwoHeads, X, Y, check_base_loss, check_run, compiled, heads
from common import fit as fit_model
from keras import ops

from keras_dwa import CompoundLoss, DynamicWeightAverage, LossWeighting

NAMES = ["reconstruction", "kl"]
KEYS = {"loss", "base_loss", *(f"{name}_{kind}" for name in NAMES for kind in ("loss", "weight"))}


def new(outputs=NAMES, temperature=0.2):
    return DynamicWeightAverage(outputs, temperature)


@pytest.fixture
def dwa():
    return new()


# How much a batch counts in an average.


def one(x):
    return 1


def samples(x):
    return ops.shape(x)[0]


class VAE(keras.Model):
    """Combines its terms in `compute_loss`, and may also average them in its own trackers."""

    def __init__(self, weighting, tracked=(), counted_by=one):
        super().__init__()
        self.encoder, self.decoder = keras.layers.Dense(2), keras.layers.Dense(4)
        self.compound = CompoundLoss(NAMES, weighting)
        self.trackers = {name: keras.metrics.Mean(name=f"{name}_loss") for name in tracked}
        self.counted_by = counted_by

    def call(self, x):
        code = self.encoder(x)
        return {"code": code, "image": self.decoder(code)}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        terms = {
            "reconstruction": ops.mean(ops.sum(ops.square(x - y_pred["image"]), axis=-1)),
            "kl": ops.mean(ops.sum(ops.square(y_pred["code"]), axis=-1)) / 2,
        }
        for name, tracker in self.trackers.items():
            tracker.update_state(self.shown(terms)[name], self.counted_by(x))
        return self.total(x, y_pred, terms, training)

    def shown(self, terms):
        """The values that the trackers average."""
        return terms

    def total(self, x, y_pred, terms, training):
        return self.compound.combine(terms, self.counted_by(x))


def descend(model, trained, compute_loss, optimizer):
    """One step on `trained` variables, as the backend does it; returns the loss."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = compute_loss()
        optimizer.apply(tape.gradient(loss, trained), trained)
    else:
        import torch

        model.zero_grad()
        loss = compute_loss()
        loss.backward()
        with torch.no_grad():
            optimizer.apply([variable.value.grad for variable in trained], trained)
    return loss


class OwnStep(VAE):
    """As in Keras's guides, its `train_step` updates and logs every metric."""

    if BACKEND == "jax":

        def train_step(self, state, x):
            import jax

            trainable, non_trainable, optimizer_variables, metrics_variables = state
            gradient = jax.value_and_grad(self.loss_and_state, has_aux=True)
            (loss, (non_trainable, metrics_variables)), gradients = gradient(
                trainable, non_trainable, metrics_variables, x
            )
            trainable, optimizer_variables = self.optimizer.stateless_apply(
                optimizer_variables, gradients, trainable
            )
            metrics = zip(self.metrics_variables, metrics_variables, strict=True)
            with keras.StatelessScope(metrics) as scope:
                logs = self.log(x, loss)
            metrics_variables = [scope.get_current_value(v) for v in self.metrics_variables]
            return logs, (trainable, non_trainable, optimizer_variables, metrics_variables)

    else:

        def train_step(self, x):
            def compute_loss():
                return self.compute_loss(x, y_pred=self(x, training=True))

            return self.log(x, descend(self, self.trainable_weights, compute_loss, self.optimizer))

    def loss_and_state(self, trainable, non_trainable, metrics_variables, x):
        y_pred, non_trainable = self.stateless_call(trainable, non_trainable, x)
        loss, (_, *state) = self.stateless_compute_loss(
            trainable, non_trainable, metrics_variables, x=x, y_pred=y_pred
        )
        return loss, state

    def log(self, x, loss):
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            elif metric.name != "compile_metrics":
                metric.update_state(x, x)
        return {metric.name: metric.result() for metric in self.metrics}


class Example(OwnStep):
    """As in Keras's VAE example, it logs trackers, and its `metrics` lists nothing else."""

    def __init__(self, weighting, tracked=NAMES, **arguments):
        super().__init__(weighting, tracked, **arguments)
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")

    @property
    def metrics(self):
        # JAX needs the other metrics.
        hides = BACKEND != "jax"
        return [self.total_loss_tracker, *self.trackers.values()] if hides else super().metrics

    def log(self, x, loss):
        self.total_loss_tracker.update_state(loss, self.counted_by(x))
        logs = {f"{name}_loss": tracker.result() for name, tracker in self.trackers.items()}
        return {"loss": self.total_loss_tracker.result(), **logs}


def fit(model, *callbacks, x=X, mode=(), **arguments):
    compiled(model, rate=0.02, **dict(mode))
    return fit_model(model, *callbacks, x=x, y=None, **{"batch_size": 8, **arguments})


# What a step logs.


def test_step_of_kerass_guides(dwa, mode):
    history = fit(OwnStep(dwa), dwa, mode=mode)
    check_run(history, dwa)
    assert set(history) == KEYS


@pytest.mark.parametrize("counted_by", [samples, one])
def test_step_of_kerass_example_only_combines_its_terms(dwa, counted_by):
    history = fit(Example(dwa, counted_by=counted_by), dwa, batch_size=32)  # 32 and 8.
    check_run(history, dwa)
    assert set(history) == KEYS


def test_terms_that_the_step_does_not_log_are_added_but_no_total(dwa):
    class LogsNoLoss(Example):
        def log(self, x, loss):
            return {"of_batch": loss}

    history = fit(LogsNoLoss(dwa, tracked=()), dwa)
    check_run(history, dwa)
    assert set(history) == KEYS - {"loss", "base_loss"} | {"of_batch"}


def test_weights_follow_what_was_recorded_and_trackers_stay_in_the_logs(dwa):
    class Doubled(VAE):
        def shown(self, terms):
            return {**terms, "kl": 2.0 * terms["kl"]}

    model = Doubled(dwa, ["kl"])
    evaluate = Lambda(on_epoch_end=lambda epoch, logs: model.evaluate(X[:4], verbose=0))
    history = fit(model, evaluate, dwa, validation_data=(X,), epochs=1)
    check_base_loss(history, {"reconstruction": 1.0, "kl": 0.5})
    np.testing.assert_allclose(dwa.state["losses"][0][0], history["kl_loss"][0] / 2, rtol=1e-6)


# Several compound losses.


class Sum(VAE):
    """Two compound losses in one `compute_loss`."""

    def __init__(self, weighting, other):
        super().__init__(weighting)
        self.other = CompoundLoss(["size"], other)

    def total(self, x, y_pred, terms, training):
        size = ops.mean(ops.square(y_pred["image"]))
        return self.compound.combine(terms) + self.other.combine({"size": size})


def check_both(history, dwa, by_hand):
    """Both weightings count in the total, and in the one under the base weights."""
    check_base_loss(history, {**dwa.base_weights, **by_hand.base_weights})
    for prefix in ("", "val_"):
        names = (*dwa.outputs, *by_hand.outputs)
        parts = [np.multiply(history[f"{n}_weight"], history[f"{prefix}{n}_loss"]) for n in names]
        np.testing.assert_allclose(history[f"{prefix}loss"], sum(parts), rtol=1e-5)


@pytest.fixture
def by_hand():
    weighting = LossWeighting({"size": 2.0})
    weighting.assign({"size": 0.25})
    return weighting


def test_two_compound_losses_both_count_and_have_their_own_state_in_a_file(dwa, by_hand, tmp_path):
    model = Sum(dwa, by_hand)
    check_both(fit(model, dwa, by_hand, validation_data=(X,)), dwa, by_hand)
    factors = dwa.factors
    model.save_weights(tmp_path / "model.weights.h5")
    dwa.reset()
    by_hand.reset()
    model.load_weights(tmp_path / "model.weights.h5")
    assert (dwa.factors, by_hand.factors) == (factors, {"size": 0.25})


class WithSize(keras.Model):
    """Adds a term to the losses that `compile` weights, or weights their sum again."""

    def compute_loss(self, *args, **kwargs):
        outputs = super().compute_loss(*args, **kwargs)
        if "outputs" in self.compound.weighting.outputs:
            return self.compound.combine({"outputs": outputs, "size": 1.0})
        return outputs + self.compound.combine({"size": 1.0})


def fit_with_size(dwa, other):
    model = WithSize(*heads())
    model.compound = CompoundLoss(other.outputs, other)
    return fit_model(compiled(model, dwa), dwa, other, validation_data=(X, Y))


def test_compound_loss_beside_the_losses_of_compile(by_hand):
    dwa = new({"easy": 1.0, "hard": 3.0})
    history = fit_with_size(dwa, by_hand)
    assert history["hard_weight"][2] != 3.0
    check_both(history, dwa, by_hand)


def test_losses_that_are_weighted_twice_are_refused():
    dwa = LossWeighting({"easy": 1.0, "hard": 2.0})
    dwa.assign({"easy": 0.5})
    message = r"`compile` already weighted: \['easy', 'hard'\]\.(?s:.*)Add the"
    with pytest.raises(ValueError, match=message):
        fit_with_size(dwa, LossWeighting(["outputs", "size"]))


# Validation.


class SumsInValidation(VAE):
    """Combines its terms only in training."""

    kl_in_validation = 1.0

    def total(self, x, y_pred, terms, training):
        if training:
            return self.compound.combine(terms)
        return terms["reconstruction"] + self.kl_in_validation * terms["kl"]


def test_validation_that_does_not_combine_costs_its_base_loss_alone(dwa):
    with pytest.warns(UserWarning, match="adds no `val_base_loss`: .* `combine`"):
        history = fit(SumsInValidation(dwa), dwa, batch_size=40, validation_data=(X,))
    assert "val_base_loss" not in history
    del history["val_loss"]
    check_run(history, dwa)


@pytest.mark.parametrize("kl_in_validation", [1.0, 4.0])
def test_validation_under_no_weights_or_base_weights_has_the_right_base_loss(kl_in_validation):
    dwa = new({"reconstruction": 1.0, "kl": 4.0})
    model = SumsInValidation(dwa, NAMES)
    model.kl_in_validation = kl_in_validation
    history = fit(model, dwa, validation_data=(X,))
    assert abs(history["kl_weight"][2] / 4 - 1) > 1e-3
    check_base_loss(history, dwa.base_weights)


# Wrong first attempts.


def combines(self, trainable, non_trainable, metrics_variables, x):
    y_pred, non_trainable = self.stateless_call(trainable, non_trainable, x)
    return self.compute_loss(x, y_pred=y_pred), (non_trainable, metrics_variables)


def drops_the_record(self, trainable, non_trainable, metrics_variables, x):
    arguments = trainable, non_trainable, metrics_variables, x
    loss, (non_trainable, _) = OwnStep.loss_and_state(self, *arguments)
    return loss, (non_trainable, metrics_variables)


@pytest.mark.skipif(BACKEND != "jax", reason="a `train_step` with JAX's state")
@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"loss_and_state": combines}, "In a `train_step`, call `self.stateless_compute_loss`"),
        ({"loss_and_state": drops_the_record}, "that `self.stateless_compute_loss` returns"),
        ({"log": lambda self, x, loss: self.get_metrics_result()}, "`loss` was 0 in the logs"),
        ({"metrics": property(lambda self: [])}, r"`Own.metrics` hides.*\[\*super\(\).metrics, "),
    ],
)
def test_each_wrong_first_try_on_jax_leads_to_the_right_one(dwa, own, message):
    batches = []
    count = Lambda(on_train_batch_end=lambda batch, logs: batches.append(batch))
    with pytest.raises((ValueError, RuntimeError), match=message):
        fit(type("Own", (OwnStep,), own)(dwa), dwa, count)
    assert len(batches) <= 2


@pytest.mark.parametrize("method", ["train_step", "compute_loss"])
def test_first_error_says_to_combine_the_terms_and_all_else_that_is_wrong(dwa, method):
    own = {method: lambda self, *args, **kwargs: None, "metrics": property(lambda self: [])}
    model = type("Own", (TwoHeads,), own)()
    dwa.set_model(model)  # It is right for a custom loop.
    with pytest.raises(ValueError, match=f"`Own` has a custom `{method}`") as raised:
        fit(model, dwa)
    message = str(raised.value)
    assert "combine({'reconstruction': ..., 'kl': ...})" in message
    assert ("2. `Own.metrics` hides" in message) == (BACKEND == "jax")
    by = "`compute_loss`, which `train_step` calls through `self.stateless_compute_loss`"
    assert (by in message) == (BACKEND == "jax" and method == "train_step")
