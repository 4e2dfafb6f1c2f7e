"""Models with a `train_step` of their own, as in Keras's guides and public code, under `fit`."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
from common import BACKEND, X, check_run, expected_weights, mode_of, one_backend
from keras import ops

from keras_dwa import CompoundLoss, DynamicWeightAverage, LossWeighting

NAMES = ["reconstruction", "kl"]


def new():
    return DynamicWeightAverage(NAMES, temperature=0.2)


@pytest.fixture(params=["default", "eager"])
def mode(request):
    return mode_of(request)


class Terms(keras.Model):
    """An encoder, a decoder and the two terms of a variational autoencoder."""

    def __init__(self, weighting):
        super().__init__()
        self.encoder = keras.layers.Dense(4)
        self.decoder = keras.layers.Dense(4)
        self.compound = CompoundLoss(NAMES, weighting)

    def build(self, shape):
        self.encoder.build(shape)
        self.decoder.build((None, 2))

    def call(self, x):
        mean, log_variance = ops.split(self.encoder(x), 2, axis=-1)
        return {"mean": mean, "log_variance": log_variance, "image": self.decoder(mean)}

    def terms(self, x, y_pred):
        mean, log_variance = y_pred["mean"], y_pred["log_variance"]
        divergence = -0.5 * (1 + log_variance - ops.square(mean) - ops.exp(log_variance))
        return {
            "reconstruction": ops.mean(ops.sum(ops.square(x - y_pred["image"]), axis=-1)),
            "kl": ops.mean(ops.sum(divergence, axis=-1)),
        }


def descend(model, trained, compute_loss, optimizer=None):
    """One step on `trained` variables, in the manner of the backend; returns what was computed."""
    optimizer = optimizer or model.optimizer
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss, *others = compute_loss()
        optimizer.apply(tape.gradient(loss, trained), trained)
    else:
        import torch

        model.zero_grad()
        loss, *others = compute_loss()
        loss.backward()
        with torch.no_grad():
            optimizer.apply([variable.value.grad for variable in trained], trained)
    return loss, *others


class VAE(Terms):
    """As in Keras's example: trackers of its own, which are all that its `metrics` list."""

    def __init__(self, weighting, scale=1.0, samples=None):
        super().__init__(weighting)
        self.scale, self.samples = scale, samples
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
        self.reconstruction_loss_tracker = keras.metrics.Mean(name="reconstruction_loss")
        self.kl_loss_tracker = keras.metrics.Mean(name="kl_loss")

    @property
    def metrics(self):
        return [self.total_loss_tracker, self.reconstruction_loss_tracker, self.kl_loss_tracker]

    def train_step(self, x):
        def compute_loss():
            terms = self.terms(x, self(x, training=True))
            return self.compound.combine(terms, self.samples or ops.shape(x)[0]), terms

        total_loss, terms = descend(self, self.trainable_weights, compute_loss)
        self.total_loss_tracker.update_state(total_loss)
        self.reconstruction_loss_tracker.update_state(terms["reconstruction"])
        self.kl_loss_tracker.update_state(terms["kl"] * self.scale)
        return {
            "loss": self.total_loss_tracker.result(),
            "reconstruction_loss": self.reconstruction_loss_tracker.result(),
            "kl_loss": self.kl_loss_tracker.result(),
        }


def fit(model, *callbacks, mode=None, **arguments):
    if not model.built:
        model.build((None, 4))
    model.compile(optimizer=keras.optimizers.SGD(0.02), **(mode or {}))
    arguments = {"batch_size": 8, "epochs": 4, "verbose": 0, **arguments}
    return model.fit(X, callbacks=list(callbacks), **arguments).history


not_on_jax = pytest.mark.skipif(BACKEND == "jax", reason="JAX's `train_step` takes its state")


KEYS = {"loss", "base_loss", *(f"{name}_{kind}" for name in NAMES for kind in ("loss", "weight"))}


@not_on_jax
@pytest.mark.parametrize("samples", [None, 1])
def test_model_of_kerass_example_only_combines_its_terms(mode, samples):
    dwa = new()
    # An epoch's last batch is smaller, which its trackers do not mind, where `combine` does not.
    history = fit(VAE(dwa, samples=samples), dwa, mode=mode, batch_size=16 if samples else 8)
    check_run(history, dwa)
    assert set(history) == KEYS


@not_on_jax
def test_own_step_trains_on_the_weights_that_are_logged():
    dwa = new()
    model, expected = VAE(dwa), VAE(LossWeighting(NAMES))
    for each in (model, expected):
        each.build((None, 4))
    expected.set_weights(model.get_weights())
    history = fit(model, dwa, shuffle=False)
    expected.compile(optimizer=keras.optimizers.SGD(0.02), run_eagerly=True)
    for epoch in range(4):
        weights = {name: history[f"{name}_weight"][epoch] for name in NAMES}
        # In place of `combine`, with floats.
        expected.compound = SimpleNamespace(
            combine=lambda terms, _, weights=weights: sum(weights[n] * terms[n] for n in NAMES)
        )
        expected.fit(X, batch_size=8, verbose=0, shuffle=False)
    for ours, theirs in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


class LogsTheTotal(VAE):
    """Shows no terms."""

    def train_step(self, x):
        return {"loss": super().train_step(x)["loss"]}


@not_on_jax
def test_terms_that_the_step_does_not_log_are_added(mode):
    dwa = new()
    history = fit(LogsTheTotal(dwa, samples=1), dwa, mode=mode)
    check_run(history, dwa)
    assert set(history) == KEYS


class KnowsSizes(VAE):
    """Tracks by the samples of a batch, of which `combine` is not told."""

    def __init__(self, weighting):
        super().__init__(weighting, samples=1)
        self.sums = {name: keras.metrics.Mean() for name in NAMES}

    @property
    def metrics(self):
        return [*super().metrics, *self.sums.values()]

    def train_step(self, x):
        self.reconstruction_loss_tracker.reset_state()
        self.kl_loss_tracker.reset_state()
        logs = super().train_step(x)
        for name, sums in self.sums.items():
            sums.update_state(logs[f"{name}_loss"], sample_weight=ops.shape(x)[0])
        return {**logs, **{f"{name}_loss": sums.result() for name, sums in self.sums.items()}}


@not_on_jax
def test_averages_over_samples_are_no_mismatch_where_combine_knows_of_none():
    dwa = new()
    fit(KnowsSizes(dwa), dwa, batch_size=32)  # 32 and 8.
    assert dwa.factors["kl"] != 1.0


class Weighted(VAE):
    """Logs the weighted term."""

    def train_step(self, x):
        weight = self.compound.loss_weights["kl"]
        logs = super().train_step(x)
        return {**logs, "kl_loss": logs["kl_loss"] * weight}


class LastBatch(VAE):
    """Logs the term of the last batch."""

    def train_step(self, x):
        self.kl_loss_tracker.reset_state()
        return super().train_step(x)


@not_on_jax
@pytest.mark.parametrize(
    ("make_model", "batch_size", "epochs"),
    [
        (lambda dwa: VAE(dwa, scale=2.0), 8, 0),
        (lambda dwa: VAE(dwa, scale=2.0), 40, 0),
        (lambda dwa: LastBatch(dwa), 20, 0),
        (lambda dwa: Weighted(dwa), 16, 2),
    ],
)
def test_logs_of_other_values_than_the_unweighted_terms_are_refused(make_model, batch_size, epochs):
    ended = []
    count = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ended.append(epoch))
    dwa = DynamicWeightAverage(NAMES, temperature=0.02)
    with pytest.raises(ValueError, match=r"for `kl_loss`, but the compound loss got"):
        fit(make_model(dwa), dwa, count, batch_size=batch_size)
    assert len(ended) == epochs


class Tracks(Terms):
    """Updates a tracker in `compute_loss`, in the place of the log of that term."""

    def __init__(self, weighting, scale=1.0, recorded=1.0):
        super().__init__(weighting)
        self.scale, self.recorded = scale, recorded
        self.kl_loss_tracker = keras.metrics.Mean(name="kl_loss")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        terms = self.terms(x, y_pred)
        self.kl_loss_tracker.update_state(self.scale * terms["kl"])
        return self.compound.combine({**terms, "kl": terms["kl"] * self.recorded})


def test_tracker_that_compute_loss_updates_is_the_log_of_its_term(mode):
    dwa = new()
    evaluate = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: model.evaluate(X[:4], verbose=0)
    )
    model = Tracks(dwa)
    history = fit(model, evaluate, dwa, mode=mode, batch_size=40, validation_split=0.2)
    check_run(history, dwa)
    assert set(history) > KEYS
    with pytest.raises(ValueError, match="for `kl_loss`, but the compound loss got"):
        fit(Tracks(dwa, scale=2.0), dwa, mode=mode, validation_split=0.2, batch_size=40)


class TracksTwo(Tracks):
    """Uses the compound loss twice in a step, which counts as two batches."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred)
        return 0.5 * loss + 0.5 * self.compound.combine(self.terms(x, y_pred))


def test_compound_loss_that_is_used_twice_in_a_step_is_no_mismatch(mode):
    dwa = new()
    check_run(fit(TracksTwo(dwa), dwa, mode=mode), dwa)


def test_term_that_is_nan_in_tracker_and_record_is_no_mismatch():
    dwa = new()
    with pytest.warns(UserWarning, match="not finite"):
        fit(Tracks(dwa, scale=np.nan, recorded=np.nan), dwa, epochs=1)
    assert dwa.factors == dict.fromkeys(NAMES, 1.0)


class AllMetrics(Terms):
    """As in Keras's guides: every metric is updated, and logged, whatever it is."""

    def __init__(self, weighting):
        super().__init__(weighting)
        self.loss_tracker = keras.metrics.Mean(name="loss")

    def train_step(self, x):
        def compute_loss():
            return (self.compound.combine(self.terms(x, self(x, training=True))),)

        (loss,) = descend(self, self.trainable_weights, compute_loss)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            elif metric.name != "compile_metrics":
                metric.update_state(x, x)
        return {metric.name: metric.result() for metric in self.metrics}


@not_on_jax
def test_step_that_updates_all_metrics(mode):
    dwa = new()
    check_run(fit(AllMetrics(dwa), dwa, mode=mode), dwa)


class GAN(keras.Model):
    """Two losses of several terms each, each with its variables, optimizer and weighting."""

    def __init__(self, generator_weighting, discriminator_weighting, tracked):
        super().__init__()
        self.generator, self.discriminator = keras.layers.Dense(4), keras.layers.Dense(1)
        self.discriminator_optimizer = keras.optimizers.SGD(0.02)
        self.of_generator = CompoundLoss(["fool", "identity"], generator_weighting)
        self.of_discriminator = CompoundLoss(["real", "fake"], discriminator_weighting)
        self.trackers = {name: keras.metrics.Mean(name=f"{name}_loss") for name in tracked}

    def build(self, shape):
        self.generator.build(shape)
        self.discriminator.build(shape)
        self.discriminator_optimizer.build(self.discriminator.trainable_weights)

    def train_step(self, x):
        def generator_loss():
            made = self.generator(x)
            terms = {
                "fool": ops.mean(ops.softplus(-self.discriminator(made))),
                "identity": ops.mean(ops.abs(made - x)),
            }
            return self.of_generator.combine(terms), terms

        def discriminator_loss():
            terms = {
                "real": ops.mean(ops.softplus(-self.discriminator(x))),
                "fake": ops.mean(ops.softplus(self.discriminator(self.generator(x)))),
            }
            return self.of_discriminator.combine(terms), terms

        variables = self.generator.trainable_weights
        _, terms = descend(self, variables, generator_loss)
        variables = self.discriminator.trainable_weights
        _, others = descend(self, variables, discriminator_loss, self.discriminator_optimizer)
        for name, tracker in self.trackers.items():
            tracker.update_state({**terms, **others}[name])
        logs = {f"{name}_loss": tracker.result() for name, tracker in self.trackers.items()}
        return {**logs, "of_all": sum(terms.values()) + sum(others.values())}


@not_on_jax
@pytest.mark.parametrize("tracked", [("fool", "identity", "real", "fake"), ("fake",), ()])
def test_each_of_several_losses_has_a_weighting(mode, tmp_path, tracked):
    generator = DynamicWeightAverage(["fool", "identity"], temperature=0.2)
    discriminator = DynamicWeightAverage(["real", "fake"], temperature=0.2)
    model = GAN(generator, discriminator, tracked)
    history = fit(model, generator, discriminator, mode=mode)
    assert not {"loss", "base_loss"} & set(history)
    for dwa in (generator, discriminator):
        names = dwa.outputs
        weights = np.array([history[f"{name}_weight"] for name in names]).T
        np.testing.assert_allclose(weights, expected_weights(history, dwa, 0.2), rtol=1e-5)
        assert np.abs(weights - 1).max() > 1e-3
    # Each has its own state in a file.
    model.save_weights(tmp_path / "gan.weights.h5")
    states = [(dwa.factors, dwa.state["losses"].tolist()) for dwa in (generator, discriminator)]
    for dwa in (generator, discriminator):
        dwa.reset()
    model.load_weights(tmp_path / "gan.weights.h5")
    for dwa, state in zip((generator, discriminator), states, strict=True):
        assert (dwa.factors, dwa.state["losses"].tolist()) == state


class CombinesInTraining(Terms):
    """Combines its terms in training alone, and reads the weights in the step."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        terms = self.terms(x, y_pred)
        if not training:
            return sum(terms.values())
        nothing = 0.0 * self.compound.loss_weights["kl"]
        return self.compound.combine(terms, ops.shape(x)[0]) + nothing


@pytest.mark.parametrize("batch_size", [40, 30])
def test_validation_that_does_not_combine_costs_its_base_loss_alone(mode, batch_size):
    dwa = new()
    fit_arguments = {"batch_size": batch_size, "validation_data": (X,)}
    with pytest.warns(UserWarning, match="adds no `val_base_loss`: .* `combine`"):
        history = fit(CombinesInTraining(dwa), dwa, mode=mode, **fit_arguments)
    assert "val_base_loss" not in history
    weights = np.array([history[f"{name}_weight"] for name in NAMES]).T
    np.testing.assert_allclose(weights, expected_weights(history, dwa, 0.2), rtol=1e-5)


class Validates(VAE):
    """Sums its terms in validation as before, under numbers."""

    def __init__(self, weighting, scales):
        super().__init__(weighting)
        self.scales = scales

    def test_step(self, x):
        terms = self.terms(x, self(x))
        self.total_loss_tracker.update_state(sum(self.scales[n] * terms[n] for n in NAMES))
        self.reconstruction_loss_tracker.update_state(terms["reconstruction"])
        self.kl_loss_tracker.update_state(terms["kl"])
        logs = {metric.name: metric.result() for metric in self.metrics}
        return {"loss": logs.pop("total_loss"), **logs}


@not_on_jax
@pytest.mark.parametrize("kl", [1.0, 4.0])
@pytest.mark.parametrize("kl_in_validation", [1.0, 4.0])
def test_validation_under_no_weights_or_base_weights_has_the_right_base_loss(kl, kl_in_validation):
    if kl_in_validation > kl:
        pytest.skip("neither")
    dwa = DynamicWeightAverage({"reconstruction": 1.0, "kl": kl}, temperature=0.2)
    model = Validates(dwa, {"reconstruction": 1.0, "kl": kl_in_validation})
    history = fit(model, dwa, validation_data=(X,))
    assert abs(history["kl_weight"][3] / kl - 1) > 1e-3
    base = np.array(history["val_reconstruction_loss"]) + kl * np.array(history["val_kl_loss"])
    np.testing.assert_allclose(history["val_base_loss"], base, rtol=1e-5)


class Sum(Terms):
    """Two compound losses in one `compute_loss`."""

    def __init__(self, weighting, other):
        super().__init__(weighting)
        self.other = CompoundLoss(["size"], other)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        size = ops.mean(ops.square(y_pred["image"]))
        return self.compound.combine(self.terms(x, y_pred)) + self.other.combine({"size": size})


def test_two_weightings_of_one_loss_both_count_in_base_loss(mode):
    dwa, by_hand = new(), LossWeighting({"size": 2.0})
    by_hand.assign({"size": 0.25})
    history = fit(Sum(dwa, by_hand), dwa, by_hand, mode=mode)
    names = [*NAMES, "size"]
    assert history["size_weight"] == [0.5] * 4
    weighted = sum(np.array(history[f"{n}_weight"]) * history[f"{n}_loss"] for n in names)
    np.testing.assert_allclose(history["loss"], weighted, rtol=1e-5)
    base = sum(np.array(history[f"{n}_loss"]) for n in NAMES) + 2 * np.array(history["size_loss"])
    np.testing.assert_allclose(history["base_loss"], base, rtol=1e-5)


class ByComputeLoss(Terms):
    """A `train_step` on JAX: its loss comes from `compute_loss`."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return self.compound.combine(self.terms(x, y_pred), ops.shape(x)[0])

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
        with keras.StatelessScope(
            zip(self.metrics_variables, metrics_variables, strict=True)
        ) as scope:
            logs = self.log(loss)
        metrics_variables = [scope.get_current_value(v) for v in self.metrics_variables]
        return logs, (trainable, non_trainable, optimizer_variables, metrics_variables)

    def loss_and_state(self, trainable, non_trainable, metrics_variables, x):
        y_pred, non_trainable = self.stateless_call(trainable, non_trainable, x)
        loss, (_, *state) = self.stateless_compute_loss(
            trainable, non_trainable, metrics_variables, x=x, y_pred=y_pred
        )
        return loss, state

    def log(self, loss):
        next(metric for metric in self.metrics if metric.name == "loss").update_state(loss)
        return self.get_metrics_result()


only_on_jax = pytest.mark.skipif(BACKEND != "jax", reason="a `train_step` with JAX's state")


@only_on_jax
def test_train_step_on_jax_by_stateless_compute_loss(mode):
    dwa = new()
    history = fit(ByComputeLoss(dwa), dwa, mode=mode)
    check_run(history, dwa)
    assert set(history) == KEYS


class LogsNoLoss(ByComputeLoss):
    def log(self, loss):
        logs = super().log(loss)
        return {key: logs[key] for key in logs if key != "loss"}


@only_on_jax
def test_logs_without_loss_on_jax_lack_base_loss_alone():
    dwa = new()
    history = fit(LogsNoLoss(dwa), dwa)
    assert set(history) == KEYS - {"loss", "base_loss"}
    assert abs(history["kl_weight"][3] - 1) > 1e-3


class LogsTheTotalOnJax(ByComputeLoss):
    def log(self, loss):
        return {"loss": super().log(loss)["loss"]}


@only_on_jax
@pytest.mark.parametrize("batch_size", [40, 8])
def test_terms_that_the_step_does_not_log_are_added_on_jax(batch_size):
    dwa = new()
    history = fit(LogsTheTotalOnJax(dwa), dwa, batch_size=batch_size)
    check_run(history, dwa)
    assert set(history) == KEYS


class Combines(ByComputeLoss):
    def loss_and_state(self, trainable, non_trainable, metrics_variables, x):
        y_pred, non_trainable = self.stateless_call(trainable, non_trainable, x)
        return self.compound.combine(self.terms(x, y_pred)), (non_trainable, metrics_variables)


class CallsComputeLoss(ByComputeLoss):
    def loss_and_state(self, trainable, non_trainable, metrics_variables, x):
        y_pred, non_trainable = self.stateless_call(trainable, non_trainable, x)
        return self.compute_loss(x, y_pred=y_pred), (non_trainable, metrics_variables)


class DropsTheRecord(ByComputeLoss):
    def loss_and_state(self, trainable, non_trainable, metrics_variables, x):
        loss, (non_trainable, _) = super().loss_and_state(
            trainable, non_trainable, metrics_variables, x
        )
        return loss, (non_trainable, metrics_variables)


class LeavesLossAtZero(ByComputeLoss):
    def log(self, loss):
        return self.get_metrics_result()


class Hidden(ByComputeLoss):
    @property
    def metrics(self):
        return []


@only_on_jax
@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (Combines, "in a `train_step` by `self.stateless_compute_loss`"),
        (CallsComputeLoss, "in a `train_step` by `self.stateless_compute_loss`"),
        (DropsTheRecord, "`metrics_variables` that `self.stateless_compute_loss` gives"),
        (LeavesLossAtZero, "`loss` was 0 in the logs"),
        (Hidden, r"`Hidden.metrics` hides.*\[\*super\(\).metrics, ...\]"),
    ],
)
def test_each_wrong_first_try_on_jax_leads_to_the_right_one(model_class, message):
    dwa, batches = new(), []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_, **__: batches.append(1))
    with pytest.raises((ValueError, RuntimeError), match=message):
        fit(model_class(dwa), dwa, count)
    assert len(batches) <= 2


class NoCompound(Terms):
    def __init__(self, weighting):
        super().__init__(LossWeighting(NAMES))
        self.compound = None

    @property
    def metrics(self):
        return []


@pytest.mark.parametrize("method", ["train_step", "compute_loss"])
def test_first_error_says_to_combine_the_terms_and_all_else_that_is_wrong(method):
    dwa = new()
    model = type("Own", (NoCompound,), {method: lambda self, *args: None})(dwa)
    dwa.set_model(model)  # For a loop of one's own, it is right.
    with pytest.raises(ValueError, match="`Own` has a step of its own") as raised:
        fit(model, dwa)
    message = str(raised.value)
    assert f"keras_dwa.CompoundLoss({NAMES}, weighting)" in message
    assert "combine({'reconstruction': ..., 'kl': ...})" in message
    assert "compile(" not in message
    assert ("2. `Own.metrics` hides" in message) == (BACKEND == "jax")
    by = "`compute_loss`, which `train_step` calls by `self.stateless_compute_loss`"
    assert (by in message) == (BACKEND == "jax" and method == "train_step")
    assert ("`train_step`" in message) == (method == "train_step")


@one_backend
def test_name_that_the_logs_would_have_twice_is_hinted_at():
    dwa = LossWeighting(["kl_loss", "size"])
    with pytest.warns(UserWarning, match=r"\['kl_loss_loss'\]. Leave `_loss` out"):
        CompoundLoss(["kl_loss", "size"], dwa)
