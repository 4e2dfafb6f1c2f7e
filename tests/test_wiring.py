"""What is wired wrongly is refused, at the latest when the first epoch ends; what is not, works."""

import contextlib
import math
import threading
import warnings

import keras
import numpy as np
import pytest
from common import (
    BACKEND,
    LOSSES,
    ComputeLoss,
    TwoHeads,
    X,
    Y,
    check_run,
    dict_model,
    heads,
    joined,
    our_messages,
    train,
)

from keras_dwa import CompoundLoss, DynamicWeightAverage


class Count(keras.callbacks.Callback):
    """How far the `fit`s of a case came."""

    batches = epochs = 0

    def on_train_batch_end(self, batch, logs=None):
        Count.batches += 1

    def on_epoch_end(self, epoch, logs=None):
        Count.epochs += 1


def new(names=("easy", "hard")):
    return DynamicWeightAverage(list(names), temperature=0.2)


def compiled(model, loss_weights, loss=LOSSES, **arguments):
    model.compile(keras.optimizers.SGD(0.05), loss, loss_weights=loss_weights, **arguments)
    return model


BATCHES = 5


def fit(model, *callbacks, x=X, y=Y, **arguments):
    # Losses and weights are looked at after the second batch.
    arguments = {"batch_size": len(X) // BATCHES, "epochs": 5, "verbose": 0, **arguments}
    return model.fit(x, y, callbacks=[*callbacks, Count()], **arguments).history


def list_model():
    inputs, outputs = heads()
    return keras.Model(inputs, [outputs["hard"], outputs["easy"]])


LIST_TARGETS = [Y["hard"], Y["easy"]]


def no_loss_weights():
    fit(compiled(dict_model(), None), new())


def plain_numbers_for_loss_weights():
    fit(compiled(dict_model(), {"easy": 1.0, "hard": 2.0}), new())


def no_loss():
    model, dwa = dict_model(), new()
    model.compile("sgd", loss_weights=dwa.loss_weights)
    dwa.set_model(model)


def weights_of_another_callback():
    fit(compiled(dict_model(), new().loss_weights), new())


def two_callbacks():
    dwa, other = new(), new()
    fit(compiled(dict_model(), dwa.loss_weights), dwa, other)


def the_same_callback_twice():
    dwa = new()
    fit(compiled(dict_model(), dwa.loss_weights), dwa, dwa)


def compiled_anew_without_the_weights():
    model, dwa = dict_model(), new()
    model.fit(X, Y, verbose=0, callbacks=[dwa]) if compiled(model, dwa.loss_weights) else None
    fit(compiled(model, None), dwa)


def compiled_anew_by_another_callback():
    class Recompile(keras.callbacks.Callback):
        def set_model(self, model):
            compiled(model, {"easy": 10.0, "hard": 1.0})
            model.test_on_batch(X, Y)  # Keras's fit is past building optimizer and metrics.

    dwa = new()
    fit(compiled(dict_model(), dwa.loss_weights), dwa, Recompile())


def callback_list_without_a_model():
    dwa = new()
    model = compiled(dict_model(), dwa.loss_weights)
    model.fit(X, Y, verbose=0, callbacks=keras.callbacks.CallbackList([dwa], add_history=True))


def one_loss_for_all_outputs():
    dwa = new(["easy"])
    fit(compiled(dict_model(), dwa.loss_weights, "mse"), dwa)


def list_of_losses():
    dwa = new()
    fit(compiled(list_model(), dwa.loss_weights, ["mae", "mse"]), dwa, y=LIST_TARGETS)


def lists_within_a_dict_of_losses():
    dwa = new()
    fit(compiled(dict_model(), dwa.loss_weights, {"easy": ["mse"], "hard": ["mae"]}), dwa)


def list_of_weights():
    # Keras pairs it with the outputs in the model's order, not in that of the loss dict.
    dwa = new()
    weights = [dwa.loss_weights["easy"], dwa.loss_weights["hard"]]
    fit(compiled(list_model(), weights), dwa, y=LIST_TARGETS)


def swapped_weights():
    dwa = new()
    swapped = {"easy": dwa.loss_weights["hard"], "hard": dwa.loss_weights["easy"]}
    fit(compiled(dict_model(), swapped), dwa)


def another_name_than_the_losses():
    dwa = new(["easy", "heavy"])
    fit(compiled(dict_model(), dwa.loss_weights), dwa)


def missing_name():
    dwa = new(["easy"])
    fit(compiled(dict_model(), dwa.loss_weights), dwa)


def extra_name():
    dwa = new(["easy", "hard", "third"])
    fit(compiled(dict_model(), dwa.loss_weights), dwa)


def loss_of_no_output():
    dwa = new(["easy", "hard", "third"])
    fit(compiled(dict_model(), dwa.loss_weights, {**LOSSES, "third": "mse"}), dwa)


def weights_in_a_list_beside_a_loss_of_none():
    inputs, outputs = heads()
    features = keras.layers.Identity(name="features")(inputs)
    model = keras.Model(inputs, [outputs["easy"], features, outputs["hard"]])
    dwa = new()
    weights = [dwa.loss_weights["easy"], None, dwa.loss_weights["hard"]]
    model = compiled(model, weights, {**LOSSES, "features": None})
    fit(model, dwa, y=[Y["easy"], X, Y["hard"]])


def flat_weights_of_nested_losses():
    inputs, outputs = heads()
    # Flattened, "a" comes before "a-b"; as paths, "a-b" comes before "a/easy".
    model = keras.Model(inputs, {"a": {"easy": outputs["easy"]}, "a-b": outputs["hard"]})
    dwa = new(["a/easy", "a-b"])
    losses = {"a": {"easy": "mse"}, "a-b": "mae"}
    targets = {"a": {"easy": Y["easy"]}, "a-b": Y["hard"]}
    fit(compiled(model, dwa.loss_weights, losses), dwa, y=targets)


class ListOutputs(TwoHeads):
    def call(self, inputs):
        return list(super().call(inputs).values())


def unnamed_outputs():
    dwa = new()
    fit(compiled(ListOutputs(), dwa.loss_weights), dwa, y=list(Y.values()))


def unnamed_outputs_with_a_list_of_losses():
    dwa = new()
    fit(compiled(ListOutputs(), dwa.loss_weights, ["mse", "mae"]), dwa, y=list(Y.values()))


def names_that_tensorflow_refuses():
    inputs, outputs = heads()
    dwa = new(["größe", "hard"])
    model = keras.Model(inputs, {"größe": outputs["easy"], "hard": outputs["hard"]})
    model = compiled(model, dwa.loss_weights, {"größe": "mse", "hard": "mae"})
    fit(model, dwa, y={"größe": Y["easy"], "hard": Y["hard"]})


def metrics_that_hide_the_weights():
    class OwnMetrics(keras.Model):
        @property
        def metrics(self):
            return []

    dwa = new()
    fit(compiled(OwnMetrics(*heads()), dwa.loss_weights), dwa)


def attribute_that_is_taken():
    model, dwa = dict_model(), new()
    model.loss_weighting = "mine"
    fit(compiled(model, dwa.loss_weights), dwa)


def metric_that_replaces_a_loss():
    model, dwa = dict_model(), new()
    model.mine = keras.metrics.Mean(name="easy_loss")
    fit(compiled(model, dwa.loss_weights), dwa)


def metric_that_replaces_a_term():
    dwa = new()
    model = ComputeLoss(dwa)
    model.mine = keras.metrics.Mean(name="easy_loss")
    model.compile("sgd")
    fit(model, dwa)


def metric_named_like_a_weight():
    dwa = new()
    metrics = {"easy": keras.metrics.MeanAbsoluteError(name="weight")}
    fit(compiled(dict_model(), dwa.loss_weights, metrics=metrics), dwa)


def metric_named_like_the_base_loss():
    model, dwa = dict_model(), new()
    model.mine = keras.metrics.Mean(name="base_loss")
    fit(compiled(model, dwa.loss_weights), dwa)


def metric_named_like_the_val_base_loss():
    model, dwa = dict_model(), new()
    model.mine = keras.metrics.Mean(name="val_base_loss")
    fit(compiled(model, dwa.loss_weights), dwa)


def log_that_another_callback_takes():
    dwa = new()
    take = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.pop("easy_loss"))
    fit(compiled(dict_model(), dwa.loss_weights), take, dwa)


def history_before_the_callback():
    dwa = new()
    fit(compiled(dict_model(), dwa.loss_weights), keras.callbacks.History(), dwa)


def train_step_with_other_logs():
    class OwnLogs(keras.Model):
        def get_metrics_result(self):
            results = super().get_metrics_result()
            return {"loss": results["loss"], "mine": results["easy_loss"]}

    dwa = new()
    fit(compiled(OwnLogs(*heads()), dwa.loss_weights), dwa)


def unweighted(y, y_pred):
    errors = {name: y[name] - y_pred[name] for name in y}
    return keras.ops.mean(errors["easy"] ** 2) + keras.ops.mean(keras.ops.abs(errors["hard"]))


def compute_loss_of_its_own():
    class OwnLoss(TwoHeads):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return unweighted(y, y_pred)

    dwa = new()
    fit(compiled(OwnLoss(), dwa.loss_weights), dwa)


class Unweighted(TwoHeads):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        super().compute_loss(x, y, y_pred, sample_weight)
        return unweighted(y, y_pred)


def compute_loss_that_ignores_the_weights():
    dwa = new()
    fit(compiled(Unweighted(), dwa.loss_weights), dwa)


def compute_loss_that_ignores_the_compound_loss():
    class Ignored(ComputeLoss):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            super().compute_loss(x, y, y_pred, sample_weight)
            return unweighted(y, y_pred)

    dwa = new()
    model = Ignored(dwa)
    model.compile("sgd")
    fit(model, dwa)


def compound_loss_that_is_never_called():
    dwa = new()
    CompoundLoss(LOSSES, dwa)
    model = compiled(keras.Model(*heads()), None)
    model.compute_loss = lambda x, y, y_pred, *args, **kwargs: unweighted(y, y_pred)
    fit(model, dwa)


def compound_loss_of_another_callback():
    model = ComputeLoss(new())
    model.compile("sgd")
    fit(model, new())


def compound_loss_in_the_models_call():
    class AddLoss(ComputeLoss):
        def call(self, inputs):
            terms = {"easy": keras.ops.mean(inputs), "hard": keras.ops.mean(inputs**2)}
            self.add_loss(self.compound.combine(terms))
            return super().call(inputs)

    dwa = new()
    model = AddLoss(dwa)
    model.compile("sgd")
    fit(model, dwa, y=None)


def step_to_read_the_weights_within_fit():
    dwa = new()
    model = ComputeLoss(dwa)
    model.compile("sgd")
    read = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: dwa.step())
    fit(model, read, dwa)


def total_loss_that_no_step_updates():
    class OwnLogs(ComputeLoss):
        def get_metrics_result(self):
            # As after a `train_step` that leaves out Keras's metric of the total.
            return {**super().get_metrics_result(), "loss": 0.0}

    dwa = new()
    model = OwnLogs(dwa)
    model.compile("sgd")
    fit(model, dwa)


def compound_loss_in_place_of_the_compiled_weights():
    dwa = new()
    fit(compiled(ComputeLoss(dwa), dwa.loss_weights), dwa)


def compound_loss_and_compiled_weights():
    class Twice(ComputeLoss):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = keras.Model.compute_loss(self, x, y, y_pred, sample_weight)
            return loss + self.compound(y, y_pred, sample_weight)

    dwa = new()
    fit(compiled(Twice(dwa), dwa.loss_weights), dwa)


def two_compound_losses_of_two_weightings():
    class Both(TwoHeads):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return one(y, y_pred) + other(y, y_pred)

    callbacks = new(["easy"]), new(["hard"])
    one, other = (CompoundLoss({name: "mse"}, w) for w in callbacks for name in w.outputs)
    model = Both()
    model.compile("sgd")
    fit(model, *callbacks)


def losses_of_a_compound_loss_without_its_weights():
    dwa = new()
    fit(compiled(dict_model(), None, CompoundLoss(LOSSES, dwa).losses), dwa)


def weight_assigned_between_two_fits():
    dwa = new()
    model = compiled(dict_model(), dwa.loss_weights)
    model.fit(X, Y, verbose=0, callbacks=[dwa])
    dwa.loss_weights["easy"].assign(float("nan"))
    fit(model, dwa)


def two_models_in_turn():
    dwa = new()
    first, second = (compiled(dict_model(), dwa.loss_weights) for _ in range(2))
    for model in (first, second):
        model.fit(X, Y, verbose=0, callbacks=[dwa])
    fit(first, dwa)


class FitAnother(keras.callbacks.Callback):
    """Fits another model, within or after the first epoch."""

    def __init__(self, model, dwa, at):
        super().__init__()
        self.another, self.dwa, self.at = model, dwa, at

    def on_train_batch_end(self, batch, logs=None):
        if batch == 0 and self.at == "batch":
            self.another.fit(X, Y, verbose=0, callbacks=[self.dwa])

    def on_epoch_end(self, epoch, logs=None):
        if self.at == "epoch":
            self.another.fit(X, Y, verbose=0, callbacks=[self.dwa])


def two_models_one_within_an_epoch_of_the_other():
    dwa = new()
    first, second = (compiled(dict_model(), dwa.loss_weights) for _ in range(2))
    fit(first, dwa, FitAnother(second, dwa, "batch"))


def two_models_one_between_epochs_of_the_other():
    dwa = new()
    first, second = (compiled(dict_model(), dwa.loss_weights) for _ in range(2))
    fit(first, dwa, FitAnother(second, dwa, "epoch"))


def two_models_in_two_threads():
    dwa = new()
    first, second = (compiled(dict_model(), dwa.loss_weights) for _ in range(2))

    class FitInThread(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            started = threading.Event()
            begin = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: started.set())
            arguments = {"verbose": 0, "callbacks": [dwa, begin], "epochs": 0}
            thread = threading.Thread(target=second.fit, args=(X, Y), kwargs=arguments)
            thread.start()
            thread.join()
            assert started.is_set()

    fit(first, dwa, FitInThread())


def distribution_set_after_the_callback():
    dwa = new()
    distribution = keras.distribution.DataParallel(devices=keras.distribution.list_devices("cpu"))
    with distribution.scope():
        fit(compiled(dict_model(), dwa.loss_weights), dwa)


TO_WRITE = (
    "model.compile(..., loss={'easy': ..., 'hard': ...}, loss_weights=weighting.loss_weights)"
)
DICT_TO_WRITE = TO_WRITE.replace("'easy': ..., 'hard': ...", "'hard': ..., 'easy': ...")
WEIGHTS_TO_WRITE = (
    "loss_weights={'easy': weighting.loss_weights['easy'], 'hard': weighting.loss_weights['hard']}"
)
NAMES_TO_WRITE = f"    outputs=['easy', 'hard']\nand write\n    {TO_WRITE}"
NESTED_TO_WRITE = (
    "loss_weights={'a': {'easy': weighting.loss_weights['a/easy']}, "
    "'a-b': weighting.loss_weights['a-b']}"
)
COMPOUND_TO_WRITE = "loss=compound.losses, loss_weights=compound.loss_weights)"

EVERY = ("tensorflow", "jax", "torch")
# Where Keras builds its loss before it shows the model to a callback.
EARLY = ("jax", "torch")
LATE = ("tensorflow",)

# How far training comes.
NOT_AT_ALL = "no batch"
A_FEW_BATCHES = "no epoch"
ONE_EPOCH = "one epoch"
THREE_EPOCHS = "three epochs"

MISWIRINGS = [
    # (case, backends, how far training comes, what the message has)
    (no_loss_weights, EVERY, NOT_AT_ALL, "Found `loss_weights=None`", TO_WRITE),
    (plain_numbers_for_loss_weights, EVERY, NOT_AT_ALL, "{'easy': 1.0, 'hard': 2.0}", TO_WRITE),
    (plain_numbers_for_loss_weights, EVERY, NOT_AT_ALL, "outputs={name: number}"),
    (no_loss, EVERY, NOT_AT_ALL, "compiled without a loss", TO_WRITE),
    (weights_of_another_callback, EVERY, NOT_AT_ALL, "this callback's loss weights", TO_WRITE),
    (two_callbacks, EVERY, NOT_AT_ALL, "this callback's loss weights", TO_WRITE),
    (the_same_callback_twice, EVERY, NOT_AT_ALL, "more than once", "callbacks=[weighting])"),
    (compiled_anew_without_the_weights, EVERY, NOT_AT_ALL, "`loss_weights=None`", TO_WRITE),
    (compiled_anew_by_another_callback, EVERY, A_FEW_BATCHES, "{'easy': 10.0,", TO_WRITE),
    (callback_list_without_a_model, EVERY, NOT_AT_ALL, "no model", "([weighting], model=model, ...)"),
    (one_loss_for_all_outputs, EVERY, NOT_AT_ALL, "one loss, 'mse', for all", TO_WRITE),
    (list_of_losses, EVERY, NOT_AT_ALL, "`loss` as a list", DICT_TO_WRITE),
    (lists_within_a_dict_of_losses, EVERY, NOT_AT_ALL, "['mse']", "loss={'depth': 'mae',"),
    (list_of_weights, EVERY, NOT_AT_ALL, "must have the structure of `loss`", WEIGHTS_TO_WRITE),
    (weights_in_a_list_beside_a_loss_of_none, EVERY, NOT_AT_ALL, "'features': None}"),
    (swapped_weights, EVERY, NOT_AT_ALL, "each loss its own weight", WEIGHTS_TO_WRITE),
    (another_name_than_the_losses, EVERY, NOT_AT_ALL, "['easy', 'heavy']", NAMES_TO_WRITE),
    (missing_name, EARLY, NOT_AT_ALL, "got 2 losses and 1 weights"),
    (missing_name, LATE, NOT_AT_ALL, "has the outputs ['easy']", NAMES_TO_WRITE),
    (extra_name, EARLY, NOT_AT_ALL, "got 2 losses and 3 weights"),
    (extra_name, LATE, NOT_AT_ALL, "the outputs ['easy', 'hard', 'third']", NAMES_TO_WRITE),
    (loss_of_no_output, EVERY, NOT_AT_ALL, "The path: ('third',) in the `loss` argument"),
    (flat_weights_of_nested_losses, EVERY, NOT_AT_ALL, "the structure of `loss`", NESTED_TO_WRITE),
    (unnamed_outputs, EVERY, NOT_AT_ALL, "'NoneType' object is not iterable"),
    (unnamed_outputs_with_a_list_of_losses, EVERY, NOT_AT_ALL, "(a subclassed model", TO_WRITE),
    (names_that_tensorflow_refuses, LATE, NOT_AT_ALL, "'größe_loss' is not a valid scope name"),
    (metrics_that_hide_the_weights, EVERY, NOT_AT_ALL, "`OwnMetrics.metrics`", "*super().metrics"),
    (attribute_that_is_taken, EVERY, NOT_AT_ALL, "`model.loss_weighting`", "'mine'"),
    (metric_that_replaces_a_loss, EVERY, A_FEW_BATCHES, "['easy_loss']", "name='my_easy_loss'"),
    (metric_that_replaces_a_term, EVERY, A_FEW_BATCHES, "['easy_loss']", "Leave them out"),
    (metric_named_like_a_weight, EVERY, A_FEW_BATCHES, "['easy_weight'] already", "another name"),
    (metric_named_like_the_base_loss, EVERY, A_FEW_BATCHES, "['base_loss']", "another name"),
    (
        metric_named_like_the_val_base_loss,
        EVERY,
        A_FEW_BATCHES,
        "['val_base_loss']",
        "another name",
    ),
    (log_that_another_callback_takes, EVERY, ONE_EPOCH, "`logs` lacks ['easy_loss']"),
    (history_before_the_callback, EVERY, ONE_EPOCH, "`History`", "callbacks=[weighting, history]"),
    (train_step_with_other_logs, EVERY, A_FEW_BATCHES, "['loss', 'mine']", "self.compute_metrics("),
    (compute_loss_of_its_own, EVERY, A_FEW_BATCHES, "It has ['loss']", "super().compute_loss("),
    (compute_loss_that_ignores_the_weights, EVERY, THREE_EPOCHS, "base weights", "super().comp"),
    (compute_loss_that_ignores_the_compound_loss, EVERY, THREE_EPOCHS, "base weights", "Compound"),
    (compound_loss_that_is_never_called, EVERY, A_FEW_BATCHES, "nor called", COMPOUND_TO_WRITE),
    (compound_loss_of_another_callback, EVERY, NOT_AT_ALL, "pass the callback that has it"),
    (compound_loss_in_the_models_call, ("jax",), NOT_AT_ALL, "in the model's `compute_loss`"),
    (step_to_read_the_weights_within_fit, EVERY, A_FEW_BATCHES, "closes an epoch", "weighting.loss_w"),
    (total_loss_that_no_step_updates, EVERY, ONE_EPOCH, "its parts were {'easy'", "update_state("),
    (compound_loss_in_place_of_the_compiled_weights, EVERY, A_FEW_BATCHES, "without a loss"),
    (compound_loss_and_compiled_weights, EVERY, A_FEW_BATCHES, "as well", "Use one way only"),
    (two_compound_losses_of_two_weightings, EVERY, NOT_AT_ALL, "two weightings", "['hard']"),
    (losses_of_a_compound_loss_without_its_weights, EVERY, A_FEW_BATCHES, COMPOUND_TO_WRITE),
    (weight_assigned_between_two_fits, EVERY, NOT_AT_ALL, "nan assigned", "assign({'easy': factor})"),
    (two_models_in_turn, EVERY, NOT_AT_ALL, "comes back", "loss_weights=other_weighting.loss_weights"),
    (two_models_one_within_an_epoch_of_the_other, ("jax",), A_FEW_BATCHES, "'loss_weights' has no"),
    (two_models_one_within_an_epoch_of_the_other, ("tensorflow", "torch"), ONE_EPOCH, "another `"),
    (two_models_one_between_epochs_of_the_other, EVERY, ONE_EPOCH, "another `fit`", "weighting.step({"),
    (two_models_in_two_threads, EVERY, ONE_EPOCH, "another `fit`", "in another thread"),
    (distribution_set_after_the_callback, ("jax",), NOT_AT_ALL, "DataParallel", "set_distri"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "reached", "message"),
    [
        pytest.param(case, reached, message, id=f"{case.__name__}-{backends[0]}")
        for case, backends, reached, *message in MISWIRINGS
        if BACKEND in backends
    ],
)
def test_miswiring_says_what_was_found_and_what_to_write(case, reached, message):
    Count.batches = Count.epochs = 0
    with pytest.raises((ValueError, RuntimeError, TypeError, KeyError, UserWarning)) as raised:
        case()
    for part in message:
        assert part in str(raised.value)
    assert Count.epochs <= {ONE_EPOCH: 1, THREE_EPOCHS: 2}.get(reached, 0)
    assert Count.batches < {NOT_AT_ALL: 1, A_FEW_BATCHES: BATCHES}.get(reached, math.inf)


@pytest.mark.parametrize(
    "names",
    [
        ("a", "a_loss"),
        ("a_loss", "a_weight"),
        ("loss", "weight"),
        ("left", "left/eye"),
        pytest.param(
            ("größe", "a b"),
            marks=pytest.mark.skipif(
                BACKEND == "tensorflow", reason="Keras takes ASCII without spaces on TensorFlow"
            ),
        ),
    ],
)
def test_names_are_told_apart(names):
    inputs, outputs = heads()
    model = keras.Model(inputs, dict(zip(names, outputs.values(), strict=True)))
    targets = dict(zip(names, Y.values(), strict=True))
    dwa = new(names)
    history = train(
        model, dwa, y=targets, loss=dict.fromkeys(names, "mse"), epochs=4, validation_split=0.2
    )
    check_run(history, dwa)


def test_metric_of_an_output_leaves_its_loss_alone():
    # Keras would log both as `easy_loss`, and logs the loss.
    model, dwa = dict_model(), new()
    metrics = {"easy": keras.metrics.MeanAbsoluteError(name="loss")}
    check_run(fit(compiled(model, dwa.loss_weights, metrics=metrics), dwa), dwa)


def test_logs_are_checked_beside_the_batches():
    # As Keras runs the callback where none waits for each batch.
    dwa = new()
    metrics = {"easy": keras.metrics.MeanAbsoluteError(name="weight")}
    model = compiled(dict_model(), dwa.loss_weights, metrics=metrics)
    with pytest.raises(ValueError, match="'easy_weight'"):
        model.fit(X, Y, epochs=5, verbose=0, callbacks=[dwa])


def test_weights_that_do_not_reach_the_loss_are_found_over_several_fits():
    dwa = new()
    model = compiled(Unweighted(), dwa.loss_weights)
    for _ in range(2):
        fit(model, dwa, epochs=1)
    with pytest.raises(ValueError, match="do not reach the loss"):
        fit(model, dwa, epochs=1)


def test_weights_that_do_not_reach_the_loss_are_found_after_an_epoch_of_nan():
    model, dwa = Unweighted(), new()
    # Which skips a step whose gradient is not finite.
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05), initial_scale=1.0)
    nan = {**Y, "easy": np.full_like(Y["easy"], np.nan)}
    with pytest.warns(UserWarning, match=r"'easy' \(nan\) is not finite"):
        train(model, dwa, y=nan, optimizer=optimizer, epochs=1)
    with pytest.raises(ValueError, match="do not reach the loss"):
        fit(model, dwa)


@pytest.mark.parametrize(
    "epochs",
    [
        # Other terms make up for the weights once; in the epochs before, they did not.
        [(1.0, 1.0, 2.1), (0.5, 1.0, 1.6), (0.25, 1.0, 0.25 + 1.0)],
        # The weights move by less than the sums of a training tell apart.
        [(1.0, 1.0, None), (0.5, 0.500001, None), (0.25, 0.4, None)],
        # There is nothing left to learn.
        [(1.0, 1.0, None), (0.5, 1.0, None), (0.0, 0.0, None)],
    ],
)
def test_right_loss_that_is_near_the_sum_under_the_base_weights_is_no_alarm(epochs):
    dwa = new()
    model = compiled(dict_model(), dwa.loss_weights)
    callbacks = keras.callbacks.CallbackList([dwa], add_history=True, model=model)
    callbacks.on_train_begin()
    for epoch, (easy, hard, loss) in enumerate(epochs):
        weights = dwa.step()
        if loss is None:
            loss = weights["easy"] * easy + weights["hard"] * hard
        callbacks.on_epoch_begin(epoch)
        callbacks.on_train_batch_end(0)
        callbacks.on_epoch_end(epoch, {"loss": loss, "easy_loss": easy, "hard_loss": hard})
    callbacks.on_train_end()
    assert model.history.history["easy_weight"][2] != 1.0


def test_forgotten_callback_leaves_no_weights_in_the_logs():
    dwa = new()
    history = fit(compiled(dict_model(), dwa.loss_weights))
    assert sorted(history) == ["easy_loss", "hard_loss", "loss"]
    assert dwa.step() == {"easy": 1.0, "hard": 1.0}


def test_test_step_with_other_logs_costs_the_validation_loss_under_the_base_weights():
    class OwnTestStep(TwoHeads):
        def evaluate(self, *args, **kwargs):
            return {"loss": super().evaluate(*args, **kwargs)["loss"]}

    model, dwa = OwnTestStep(), new()
    with pytest.warns(UserWarning, match="DynamicWeightAverage") as warned:
        history = train(model, dwa, validation_split=0.2, epochs=1)
    (message,) = our_messages(warned)
    assert "lack ['val_easy_loss', 'val_hard_loss']" in message
    assert sorted(key for key in history if key.startswith("val_")) == ["val_loss"]


def test_every_fit_may_run_in_another_mode():
    model, dwa = dict_model(), new()
    modes = [{}, {"run_eagerly": True}, {"run_eagerly": False}]
    once = {"batch_size": 20, "epochs": 1}
    histories = [train(model, dwa, mode=mode, **once) for mode in modes]
    for run_eagerly in (True, False):
        model.run_eagerly = run_eagerly
        histories.append(fit(model, dwa, **once))
    with eager_backend():
        histories.append(fit(model, dwa, **once))
    histories.append(fit(model, dwa, **once))
    check_run(joined(*histories), dwa)


@contextlib.contextmanager
def eager_backend():
    """The backend's own switch from compiled functions to eager ones."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.config.run_functions_eagerly(True)
        # Said of tf.data, which goes on in graphs.
        warnings.filterwarnings("ignore", "Even though the `tf.config.experimental_run_functions")
        yield
        tf.config.run_functions_eagerly(False)
    elif BACKEND == "jax":
        import jax

        with jax.disable_jit():
            yield
    else:
        import torch

        with torch.compiler.set_stance("force_eager"):
            yield


def test_fit_within_another_one_moves_its_own_weights():
    model, dwa = dict_model(), new()
    inner, inner_dwa, histories = dict_model(), new(), []

    class Inner(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                histories.append(train(inner, inner_dwa, epochs=1))

    check_run(fit(compiled(model, dwa.loss_weights), dwa, Inner()), dwa)
    check_run(joined(*histories), inner_dwa)


def test_fits_in_threads_each_move_their_own_weights():
    results = {}

    def work(index):
        dwa = new()
        results[index] = train(dict_model(), dwa, epochs=4), dwa

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for history, dwa in results.values():
        check_run(history, dwa)
