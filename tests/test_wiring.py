"""What is wired wrongly is refused, at the latest when the first epoch ends; what is not, works."""

import contextlib
import itertools
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

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
    one_backend,
    our_messages,
    train,
)

from keras_dwa import CompoundLoss, DynamicWeightAverage, LossWeighting

Lambda = keras.callbacks.LambdaCallback
BATCHES = 5
reached = []
count = Lambda(
    on_train_batch_end=lambda batch, logs: reached.append("batch"),
    on_epoch_end=lambda epoch, logs: reached.append("epoch"),
)


def new(*names):
    return DynamicWeightAverage(names or ["easy", "hard"], temperature=0.2)


def compiled(model, loss_weights, loss=LOSSES, **arguments):
    model.compile(keras.optimizers.SGD(0.05), loss, loss_weights=loss_weights, **arguments)
    return model


def fit(model, *callbacks, y=Y, **arguments):
    # Losses and weights are looked at after the second batch.
    arguments = {"batch_size": len(X) // BATCHES, "epochs": 5, "verbose": 0, **arguments}
    return model.fit(X, y, callbacks=[*callbacks, count], **arguments).history


def wired(
    bases=(keras.Model,),
    own=(),
    arrange=dict,
    names=(),
    loss=LOSSES,
    weights=lambda ours: ours,
    callbacks=lambda dwa: [dwa],
    metric=None,
    **arguments,
):
    """Fits a model of a class of `bases` with `own` methods, wired to a new callback.

    `arrange` makes the structure of the outputs and targets, `weights` that of the loss weights.
    """
    names = names or ["easy", "hard"]
    dwa, model_class = (
        DynamicWeightAverage(names, temperature=0.2),
        type("Altered", tuple(bases), dict(own)),
    )
    if issubclass(model_class, TwoHeads):
        model = model_class(*[dwa] * issubclass(model_class, ComputeLoss))
    else:
        inputs, outputs = heads()
        model = model_class(inputs, arrange(outputs))
    if metric:
        model.mine = keras.metrics.Mean(name=metric)
    compiled(model, weights(dwa.loss_weights), loss, **arguments)
    fit(model, *callbacks(dwa), y=arrange(Y))


def none(ours):
    return None


def mae(name):
    def metric(y_true, y_pred):
        return keras.losses.mean_absolute_error(y_true, y_pred)

    metric.__name__ = name
    return {"easy": metric}


def as_list(outputs):
    return [outputs["hard"], outputs["easy"]]


def nested(outputs):
    # Flattened, "a" comes before "a-b"; as paths, "a-b" comes before "a/easy".
    return {"a": {"easy": outputs["easy"]}, "a-b": outputs["hard"]}


def with_features(outputs):
    features = keras.layers.Identity(name="features")(outputs["easy"])
    return [outputs["easy"], features, outputs["hard"]]


results = keras.Model.get_metrics_result


def unweighted(self, x, y, y_pred, sample_weight):
    errors = {name: y[name] - y_pred[name] for name in y}
    return keras.ops.mean(errors["easy"] ** 2) + keras.ops.mean(keras.ops.abs(errors["hard"]))


class Unweighted(TwoHeads):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        super().compute_loss(x, y, y_pred, sample_weight)
        return unweighted(self, x, y, y_pred, sample_weight)


def twice(self, x, y, y_pred, sample_weight):
    return keras.Model.compute_loss(self, x, y, y_pred, sample_weight) + self.compound(y, y_pred)


def combine_in_call(self, inputs):
    terms = {"easy": keras.ops.mean(inputs), "hard": keras.ops.mean(inputs**2)}
    self.add_loss(self.compound.combine(terms))
    return TwoHeads.call(self, inputs)


class Recompile(keras.callbacks.Callback):
    def set_model(self, model):
        compiled(model, {"easy": 10.0, "hard": 1.0})
        model.test_on_batch(X, Y)  # Keras's fit is past building optimizer and metrics.


def no_loss():
    dwa = new()
    dwa.set_model(compiled(dict_model(), dwa.loss_weights, None))


def compiled_anew():
    model, dwa = dict_model(), new()
    train(model, dwa, epochs=1)
    fit(compiled(model, None), dwa)


def callback_list():
    dwa = new()
    callbacks = keras.callbacks.CallbackList([dwa], add_history=True)
    compiled(dict_model(), dwa.loss_weights).fit(X, Y, verbose=0, callbacks=callbacks)


def compound_in_compile(loss=lambda compound: compound):
    dwa = new()
    compound = CompoundLoss(LOSSES, dwa)
    compound(Y, Y)
    fit(compiled(dict_model(), None, loss(compound)), dwa)


def two_weightings():
    easy, hard = new("easy"), new("hard")
    one, other = CompoundLoss({"easy": "mse"}, easy), CompoundLoss({"hard": "mse"}, hard)
    model = dict_model()
    model.compute_loss = lambda x, y, y_pred, sample_weight: one(y, y_pred) + other(y, y_pred)
    fit(compiled(model, None, None), easy, hard)


def beside_a_number():
    weighting = LossWeighting(["easy"])
    weighting.assign({"easy": 0.5})
    fit(compiled(Unweighted(), {**weighting.loss_weights, "hard": 1.0}), weighting)


def two_models(inner=None):
    """In turn, or one within the other: `inner` is given the `fit` of the other model."""
    dwa = new()
    first, second = (compiled(dict_model(), dwa.loss_weights) for _ in range(2))
    once = {"verbose": 0, "callbacks": [dwa]}
    if inner:
        other = inner(lambda epochs=1: second.fit(X, Y, epochs=epochs, **once))
        return fit(first, dwa, other)
    for model in (first, second):
        model.fit(X, Y, **once)
    fit(first, dwa)


def in_thread(fit):
    with ThreadPoolExecutor() as pool:
        pool.submit(fit, epochs=0).result()


def distribution_set_later():
    distribution = keras.distribution.DataParallel(devices=keras.distribution.list_devices("cpu"))
    dwa = new()
    with distribution.scope():
        fit(compiled(dict_model(), dwa.loss_weights), dwa)


CALL = "model.compile(..., loss={'easy': ..., 'hard': ...}, loss_weights=weighting.loss_weights)"
REORDERED = CALL.replace("'easy': ..., 'hard': ...", "'hard': ..., 'easy': ...")
BY_OUTPUT = (
    "loss_weights={'easy': weighting.loss_weights['easy'], 'hard': weighting.loss_weights['hard']}"
)
OUTPUTS = f"    outputs=['easy', 'hard']\nand write\n    {CALL}"
BY_PATH = (
    "loss_weights={'a': {'easy': weighting.loss_weights['a/easy']}, "
    "'a-b': weighting.loss_weights['a-b']}"
)
COMPOUND = "loss=compound.losses, loss_weights=compound.loss_weights)"

NEW = "DynamicWeightAverage(['easy', 'hard'], temperature=0.2, weights={'easy': 1.0, 'hard': 1.0})"
JAX, TENSORFLOW = BACKEND == "jax", BACKEND == "tensorflow"
BY_CALL = {"bases": [ComputeLoss], "loss": None, "weights": none}
UNNAMED = {
    "bases": [TwoHeads],
    "own": {"call": lambda self, x: as_list(TwoHeads.call(self, x))},
    "arrange": as_list,
}
WITHIN_EPOCH = {
    "run": two_models,
    "inner": lambda fit: Lambda(on_train_batch_end=lambda batch, logs: batch or fit()),
}
# How far training comes: at most so many batches, and epochs.
NOT_AT_ALL = (0, 0)
A_FEW_BATCHES = (BATCHES - 1, 0)
ONE_EPOCH = (math.inf, 1)
THREE_EPOCHS = (math.inf, 2)


def row(case, *message, run=wired, when=True, **arguments):
    """A case, what its message has, and what runs it."""
    return [(case, partial(run, **arguments), message)] if when else []


MISWIRINGS = {
    NOT_AT_ALL: [
        row("no_loss_weights", "Found `loss_weights=None`", CALL, weights=none),
        row("plain_numbers_for_loss_weights", "{'easy': 1.0, 'hard': 2.0}", CALL,
            "outputs={name: number}", weights=lambda _: {"easy": 1.0, "hard": 2.0}),
        row("no_loss", "compiled without a loss", CALL, run=no_loss),
        row("weights_of_another_callback", "this callback's loss weights", CALL,
            weights=lambda _: new().loss_weights),
        row("two_callbacks", "this callback's loss weights", CALL,
            callbacks=lambda dwa: [dwa, new()]),
        row("same_callback_twice", "more than once", "callbacks=[weighting])",
            callbacks=lambda dwa: [dwa, dwa]),
        row("compiled_anew_without", "`loss_weights=None`", CALL, run=compiled_anew),
        row("no_model", f"{NEW} was given no model", "([weighting], model=model, ...)",
            run=callback_list),
        row("one_loss_for_all", "one loss, 'mse', for all", CALL, names=["easy"], loss="mse"),
        row("list_of_losses", "`loss` as a list", REORDERED, arrange=as_list, loss=["mae", "mse"]),
        row("list_of_losses_of_a_dict", "`loss` as a list", CALL, loss=["mae", "mse"],
            weights=lambda ours: list(ours.values())),
        row("swapped_list", "loss_weights=[weighting.loss_weights['hard'], weighting.loss_weights",
            arrange=as_list, loss=["mae", "mse"], weights=lambda ours: list(ours.values())),
        row("weight_of_another_callback_beside", "the outputs ['easy']", "{**weighting.loss_w",
            names=["easy"], weights=lambda ours: {**ours, "hard": new().loss_weights["hard"]}),
        row("no_number_beside", "the outputs ['easy']", OUTPUTS, names=["easy"],
            weights=lambda ours: {**ours, "hard": None}),
        row("lists_in_a_dict", "['mse']", "loss={'depth': 'mae',",
            loss={"easy": ["mse"], "hard": ["mae"]}),
        # Keras pairs it with the outputs in the model's order, not in that of the loss dict.
        row("list_of_weights", "must have the structure of `loss`", BY_OUTPUT,
            arrange=as_list, weights=lambda ours: list(ours.values())),
        row("weights_in_a_list_beside_a_loss_of_none", "'features': None}", arrange=with_features,
            loss={**LOSSES, "features": None},
            weights=lambda ours: [ours["easy"], None, ours["hard"]]),
        row("swapped_weights", "each loss its own weight", BY_OUTPUT,
            weights=lambda ours: {"easy": ours["hard"], "hard": ours["easy"]}),
        row("another_name", "['easy', 'heavy']", OUTPUTS, names=["easy", "heavy"]),
        # Elsewhere, Keras builds its loss before it shows the model to a callback.
        row("missing_name", "the outputs ['easy']", OUTPUTS, names=["easy"], when=TENSORFLOW),
        row("missing_name", "got 2 losses and 1 weights", names=["easy"], when=not TENSORFLOW),
        row("extra_name", "the outputs ['easy', 'hard', 'third']", OUTPUTS,
            names=["easy", "hard", "third"], when=TENSORFLOW),
        row("extra_name", "got 2 losses and 3 weights",
            names=["easy", "hard", "third"], when=not TENSORFLOW),
        row("loss_of_no_output", "The path: ('third',) in the `loss` argument",
            names=["easy", "hard", "third"], loss={**LOSSES, "third": "mse"}),
        row("flat_weights", "the structure of `loss`", BY_PATH,
            names=["a/easy", "a-b"], arrange=nested, loss=nested(LOSSES)),
        row("unnamed_outputs", "'NoneType' object is not iterable", **UNNAMED),
        row("unnamed_outputs_list", "(a subclassed model", CALL, loss=["mae", "mse"], **UNNAMED),
        row("names_that_tensorflow_refuses", "'größe_loss' is not a valid scope name",
            arrange=lambda outputs: {"größe": outputs["easy"], "hard": outputs["hard"]},
            names=["größe", "hard"], loss={"größe": "mse", "hard": "mae"}, when=TENSORFLOW),
        row("hidden_weights", "`Altered.metrics`", "*super().metrics",
            own={"metrics": property(lambda _: [])}, when=JAX),
        row("taken_attribute", "`model.loss_weighting`", "'mine'", own={"loss_weighting": "mine"}),
        row("compound_loss_of_another", "pass the callback that has it",
            run=lambda: fit(compiled(ComputeLoss(new()), None, None), new())),
        row("compound_loss_in_the_models_call", "in the model's `compute_loss`", **BY_CALL,
            own={"call": combine_in_call}, when=JAX),
        row("compound_loss_in_compile", "for `y_true`", COMPOUND, run=compound_in_compile),
        row("two_compound_losses", "two weightings", "DynamicWeightAverage(['easy'], t", "['hard']",
            run=two_weightings),
        row("models_in_turn", "comes back", "loss_weights=other_weighting.loss_weights",
            run=two_models),
        row("distribution_set_later", "DataParallel", "set_distri",
            run=distribution_set_later, when=JAX),
    ],
    A_FEW_BATCHES: [
        row("compiled_anew_by_another_callback", "{'easy': 10.0,", CALL,
            callbacks=lambda dwa: [dwa, Recompile()]),
        row("metric_like_a_loss", "['easy_loss']", "name='my_easy_loss'", metric="easy_loss"),
        row("metric_like_a_term", "has 0.0 for `easy_loss`", "(name='easy_loss')",
            metric="easy_loss", **BY_CALL),
        row("metric_like_a_weight", "['easy_weight'] already", "another name",
            metrics=mae("weight")),
        row("metric_like_base_loss", "['base_loss']", "another name", metric="base_loss"),
        row("metric_like_val_base_loss", "['val_base_loss']", "another name",
            metric="val_base_loss"),
        row("train_step_with_other_logs", "['loss', 'mine']", "self.compute_metrics(",
            own={"get_metrics_result": lambda self: {"loss": results(self)["loss"], "mine": 0}}),
        row("own_compute_loss", "It has ['loss']", "super().compute_loss(",
            own={"compute_loss": unweighted}),
        row("uncalled_compound_loss", "nor called", COMPOUND,
            own={"compute_loss": unweighted}, **BY_CALL),
        # As after a `train_step` that leaves out Keras's metric of the total.
        row("total_loss_that_no_step_updates", "its parts were {'easy'", "update_state(", **BY_CALL,
            own={"get_metrics_result": lambda self: {**results(self), "loss": 0.0}}),
        row("step_to_read_the_weights_within_fit", "closes an epoch", "weighting.loss_w", **BY_CALL,
            callbacks=lambda dwa: [Lambda(on_train_batch_end=lambda *_, **__: dwa.step()), dwa]),
        row("compound_loss_in_place_of_the_compiled_weights", "It has ['loss']",
            "a CompoundLoss and `compile` without a loss", bases=[ComputeLoss]),
        row("compound_loss_and_weights", "as well", "Use one way",
            bases=[ComputeLoss], own={"compute_loss": twice}),
        row("losses_without_the_weights", COMPOUND,
            run=compound_in_compile, loss=lambda compound: compound.losses),
        row("fit_within_an_epoch", "'loss_weights' has no", **WITHIN_EPOCH, when=JAX),
    ],
    ONE_EPOCH: [
        row("ignored_base_weights", "under no weights", bases=[Unweighted],
            names={"easy": 2.0, "hard": 1.0}),
        row("ignored_weights_beside_a_number", "base weights", run=beside_a_number),
        row("log_that_another_callback_takes", "`logs` lacks ['easy_loss']", callbacks=lambda dwa: [
            Lambda(on_epoch_end=lambda epoch, logs: logs.pop("easy_loss")), dwa]),
        row("history_first", "`History`", "callbacks=[weighting, history]",
            callbacks=lambda dwa: [keras.callbacks.History(), dwa]),
        row("fit_within_an_epoch", f"{NEW} was used by another `", **WITHIN_EPOCH, when=not JAX),
        row("fit_between_epochs", f"{NEW} was used by another `fit`", "step({", run=two_models,
            inner=lambda fit: Lambda(on_epoch_end=lambda epoch, logs: fit())),
        row("fit_in_a_thread", f"{NEW} was used by another `fit`", "thread", run=two_models,
            inner=lambda fit: Lambda(on_epoch_end=lambda epoch, logs: in_thread(fit))),
    ],
    THREE_EPOCHS: [
        row("ignored_weights", "base weights", "super().comp", bases=[Unweighted]),
        row("ignored_compound_loss", "base weights", "Compound",
            **{**BY_CALL, "bases": [Unweighted, ComputeLoss]}),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "run", "message"),
    [
        pytest.param(limits, run, message, id=case)
        for limits, rows in MISWIRINGS.items()
        for case, run, message in itertools.chain(*rows)
    ],
)
def test_miswiring_says_what_was_found_and_what_to_write(limits, run, message):
    reached.clear()
    with pytest.raises((ValueError, RuntimeError, TypeError, KeyError, UserWarning)) as raised:
        run()
    for part in message:
        assert part in str(raised.value)
    batches, epochs = limits
    assert reached.count("batch") <= batches
    assert reached.count("epoch") <= epochs


def test_names_are_told_apart():
    names = ["a", "a_loss", "a_weight", "loss", "weight", "left", "left/eye"]
    # Keras takes ASCII without spaces on TensorFlow.
    names += [] if BACKEND == "tensorflow" else ["größe", "a b"]
    inputs = keras.Input((4,))
    model = keras.Model(inputs, {name: keras.layers.Dense(1)(inputs) for name in names})
    targets = {name: X[:, :1] * k for k, name in enumerate(names)}
    dwa, losses = new(*names), dict.fromkeys(names, "mse")
    check_run(train(model, dwa, y=targets, loss=losses, validation_split=0.2), dwa)


def test_metrics_property_may_leave_out_other_metrics():
    class LeavesOut(TwoHeads):
        def __init__(self):
            super().__init__()
            self.more = keras.metrics.Mean(name="more")

        @property
        def metrics(self):
            return [metric for metric in super().metrics if metric.name != "more"]

    model, dwa = LeavesOut(), new()
    check_run(fit(compiled(model, dwa.loss_weights), dwa, epochs=3), dwa)


def test_metric_of_an_output_leaves_its_loss_alone():
    # Keras would log both as `easy_loss`, and logs the loss.
    model, dwa = dict_model(), new()
    check_run(fit(compiled(model, dwa.loss_weights, metrics=mae("loss")), dwa, epochs=3), dwa)


def test_logs_are_checked_beside_the_batches():
    # As Keras runs the callback where none waits for each batch.
    dwa = new()
    model = compiled(dict_model(), dwa.loss_weights, metrics=mae("weight"))
    with pytest.raises(ValueError, match="'easy_weight'"):
        model.fit(X, Y, epochs=5, verbose=0, callbacks=[dwa])


def test_weights_that_do_not_reach_the_loss_are_found_over_fits_and_an_epoch_of_nan():
    model, dwa = Unweighted(), new()
    # Which skips a step whose gradient is not finite.
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05), initial_scale=1.0)
    nan = {**Y, "easy": np.full_like(Y["easy"], np.nan)}
    with pytest.warns(UserWarning, match=r"'easy' \(nan\) is not finite"):
        train(model, dwa, y=nan, optimizer=optimizer, epochs=1)
    for _ in range(2):
        fit(model, dwa, epochs=1)
    with pytest.raises(ValueError, match="do not reach the loss"):
        fit(model, dwa, epochs=1)


@one_backend
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


@one_backend
def test_forgotten_callback_leaves_no_weights_in_the_logs():
    dwa = new()
    history = fit(compiled(dict_model(), dwa.loss_weights), epochs=1)
    assert sorted(history) == ["easy_loss", "hard_loss", "loss"]
    assert dwa.step() == {"easy": 1.0, "hard": 1.0}


@one_backend
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
    once = {"batch_size": 20, "epochs": 1}
    histories = [train(model, dwa, mode=mode, **once) for mode in ({}, {"run_eagerly": True})]
    model.run_eagerly = False
    histories.append(fit(model, dwa, **once))
    with eager_backend():
        histories.append(fit(model, dwa, **once))
    histories.append(fit(model, dwa, **once))
    check_run(joined(*histories), dwa)


def eager_backend():
    """The backend's own switch from compiled functions to eager ones, as a context."""
    if BACKEND == "jax":
        import jax

        return jax.disable_jit()
    if BACKEND == "torch":
        import torch

        return torch.compiler.set_stance("force_eager")
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    # Said of tf.data, which goes on in graphs.
    warnings.filterwarnings("ignore", "Even though the `tf.config.experimental_run_functions")
    stack = contextlib.ExitStack()
    stack.callback(tf.config.run_functions_eagerly, False)
    return stack


def test_fit_within_another_one_moves_its_own_weights():
    model, dwa, inner, inner_dwa, histories = dict_model(), new(), dict_model(), new(), []
    compiled(inner, inner_dwa.loss_weights)

    def fit_inner(batch, logs):
        if batch == 2:
            histories.append(fit(inner, inner_dwa, epochs=1))

    nested = Lambda(on_train_batch_end=fit_inner)
    check_run(fit(compiled(model, dwa.loss_weights), dwa, nested, epochs=3), dwa)
    check_run(joined(*histories), inner_dwa)


def test_fits_in_threads_each_move_their_own_weights():
    def work(_):
        dwa = new()
        return train(dict_model(), dwa), dwa

    with ThreadPoolExecutor(2) as pool:
        for history, dwa in pool.map(work, range(2)):
            check_run(history, dwa)
