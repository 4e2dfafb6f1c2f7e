"""What is wired wrongly is refused, at the latest when the first epoch ends; what is not, works."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import keras
import numpy as np
import pytest
from common import (
    BACKEND,
    LOSSES,
    NAMES,
    ComputeLoss,
    Lambda,
    TwoHeads,
    Y,
    check_run,
    compiled,
    deep_elsewhere,
    dict_model,
    heads,
    one_backend,
    train,
)
from common import fit as fit_model

from keras_dwa import CompoundLoss, DynamicWeightAverage
from keras_dwa._logs import add_val_base_loss
from keras_dwa._wiring import static_sums

reached = []
count = Lambda(on_train_batch_end=lambda batch, logs: reached.append(batch))


def new(*names):
    return DynamicWeightAverage(names or NAMES, temperature=0.2)


def fit(model, *callbacks, **arguments):
    # Losses and weights are checked after the second batch.
    return fit_model(model, *callbacks, count, **{"epochs": 5, **arguments})


def wired(
    base=keras.Model, own=None, arrange=dict, names=NAMES, loss=LOSSES, weights=dict, trackers=()
):
    """Fits a model of a subclass of `base`, with `own` attributes, with a new callback.

    `arrange` makes the structure of the outputs and targets, `weights` makes the loss weights.
    """
    dwa = DynamicWeightAverage(names, temperature=0.2)
    model_class = type("Altered", (base,), own or {})
    if base is keras.Model:
        inputs, outputs = heads()
        model = model_class(inputs, arrange(outputs))
    else:
        model = model_class(dwa) if base is ComputeLoss else model_class()
    model.trackers = [keras.metrics.Mean(name=name) for name in trackers]
    compiled(model, dwa, loss=loss, loss_weights=weights(dwa.loss_weights))
    fit(model, dwa, y=arrange(Y))


def in_a_list(ours):
    return list(ours.values())


def as_list(outputs):
    return [outputs["hard"], outputs["easy"]]


def nested(outputs):
    # Flattened, "a" comes before "a-b"; as paths, "a-b" comes before "a/easy".
    return {"a": {"easy": outputs["easy"]}, "a-b": outputs["hard"]}


def unweighted(self, x, y, y_pred, sample_weight):
    errors = {name: y[name] - y_pred[name] for name in y}
    return keras.ops.mean(errors["easy"] ** 2) + keras.ops.mean(keras.ops.abs(errors["hard"]))


def ignores_weights(self, *args):
    super(type(self), self).compute_loss(*args)
    return unweighted(self, *args)


def twice(self, x, y, y_pred, sample_weight):
    return keras.Model.compute_loss(self, x, y, y_pred, sample_weight) + self.compound(y, y_pred)


def two_weightings():
    weightings = [new(name) for name in LOSSES]
    for weighting in weightings:
        CompoundLoss(weighting.outputs, weighting)
    fit(compiled(dict_model(), loss=LOSSES), *weightings)


def compound_for_all(model):
    dwa = new()
    fit(compiled(model(), loss=CompoundLoss(LOSSES, dwa)), dwa)


def compound_beside(names=("mae", "mse"), loss_weights=None):
    dwa = new(*names)
    losses = {"easy": CompoundLoss(dict(zip(names, ("mae", "mse"), strict=True)), dwa)}
    model = compiled(dict_model(), loss={**losses, "hard": "mse"}, loss_weights=loss_weights)
    fit(model, dwa)


def two_losses_for_one():
    dwa, (inputs, outputs) = new("mae", "mse"), heads()
    model = keras.Model(inputs, outputs["easy"])
    compiled(model, loss=["mae", "mse"], loss_weights=in_a_list(dwa.loss_weights))
    fit(model, dwa, y=Y["easy"])


def begun_in_a_thread():
    def begin(epoch, logs):
        with ThreadPoolExecutor() as pool:
            pool.submit(dwa.on_train_begin).result()

    dwa = new()
    fit(compiled(dict_model(), dwa), dwa, Lambda(on_epoch_end=begin))


CALL = "model.compile(..., loss={'easy': ..., 'hard': ...}, loss_weights=weighting.loss_weights)"
OUTPUTS = f"    outputs=['easy', 'hard']\nand write\n    {CALL}"
COMPOUND = "loss=compound.losses, loss_weights=compound.loss_weights)"
USED = "['easy', 'hard'], temperature=0.2, weights={'easy': 1.0, 'hard': 1.0}) was used by another"
IGNORES = {"own": {"compute_loss": ignores_weights}}
# Where a row runs. What `compile` got is the same on each backend.
ALL = ("jax", "tensorflow", "torch")


def row(case, *message, run=wired, on=("jax",), **arguments):
    """A case: its name, what its message contains, and the function that runs it."""
    return [(case, partial(run, **arguments), message)] if BACKEND in on else []


# By the number of batches that training reaches at most: an epoch has five.
MISWIRINGS = {
    0: [
        row("plain_numbers_for_loss_weights", "{'easy': 1.0, 'hard': 2.0}", CALL,
            "outputs={name: number}", weights=lambda _: {"easy": 1.0, "hard": 2.0}),
        row("no_loss", "compiled without a loss", CALL, loss=None),
        row("no_model", "was given no model", "([weighting], model=model, ...)",
            run=lambda: keras.callbacks.CallbackList([new()]).on_train_begin()),
        row("one_loss_for_all", "Found `loss='mse'`", "loss={'easy': ...}", names=["easy"],
            loss="mse"),
        row("list_of_losses_of_a_dict", "alphabetical", CALL, loss=["mae", "mse"],
            weights=in_a_list),
        row("swapped_list", "each loss its own weight", "<LossWeight easy_weight>, <LossW",
            arrange=as_list, loss=["mae", "mse"], weights=in_a_list),
        row("weight_of_another_callback_beside", "the outputs ['easy']", "{**weighting.loss_w",
            names=["easy"], weights=lambda ours: {**ours, "hard": new().loss_weights["hard"]}),
        row("lists_in_a_dict", "['mse']", "nested dicts",
            loss={"easy": ["mse"], "hard": ["mae"]}),
        # Keras pairs it with the outputs in the order of the model, not of the loss dict.
        row("list_of_weights", "the structure of `loss={'easy'", "Found `loss_weights=[<Loss",
            arrange=as_list, weights=as_list),
        row("swapped_weights", "each loss its own weight", "'easy': <LossWeight hard_weight>",
            weights=lambda ours: {"easy": ours["hard"], "hard": ours["easy"]}),
        row("flat_weights", "the structure of `loss={'a': {", "'a/easy': <LossWeight",
            names=["a/easy", "a-b"], arrange=nested, loss=nested(LOSSES)),
        row("another_name", "['easy', 'heavy']", OUTPUTS, "use a compound loss",
            names=["easy", "heavy"]),
        row("no_number_beside", "the outputs ['easy']", OUTPUTS,
            "weighting.loss_weights, 'hard': 0.5}", names=["easy"],
            weights=lambda ours: {**ours, "hard": None}),
        row("hidden_weights", "`Altered.metrics`", "*super().metrics",
            own={"metrics": property(lambda _: [])}),
        row("taken_attribute", "`model.loss_weighting`", "'mine'", own={"loss_weighting": "mine"}),
        row("compound_loss_for_two_outputs", "several outputs", COMPOUND, run=compound_for_all,
            model=dict_model),
        row("weight_of_a_compound_loss", "must be 1. Found `loss_weights={'easy': 0.5,",
            "loss=compound)", run=compound_beside, loss_weights={"easy": 0.5, "hard": 1.0}),
        row("weights_of_a_compound_loss_in_another_structure", "other outputs, use dicts",
            run=compound_beside, loss_weights=[1.0, 0.5]),
        row("loss_with_the_name_of_an_output", "names of outputs: ['hard']", "Rename",
            run=compound_beside, names=("hard", "mse")),
        row("compound_for_two", "several outputs", run=compound_for_all, model=dict_model, on=ALL),
        row("two_losses_for_one_output", "one output", "CompoundLoss({'mae': ..., 'mse': ...}",
            "loss=compound)", run=two_losses_for_one),
        row("two_compound_losses", "two weightings", "DynamicWeightAverage(['easy'], t", "['hard']",
            run=two_weightings),
    ],
    4: [
        row("metric_like_a_loss", "['easy_loss']", "name='my_easy_loss'", trackers=["easy_loss"]),
        row("metrics_like_base_losses", "already has ['base_loss', 'val_base_loss']", "Rename",
            trackers=["base_loss", "val_base_loss"]),
        # On TensorFlow, Keras builds its losses in the first batch.
        row("compound_loss_for_two_unknown_outputs", "several outputs", COMPOUND,
            run=compound_for_all, model=TwoHeads, on=ALL),
        row("own_compute_loss", "has ['loss']", "self.compute_metrics(", "super().compute_loss(",
            "a CompoundLoss and `compile` without", own={"compute_loss": unweighted}, on=ALL),
        row("compound_loss_and_weights", "also calls", "Use only one",
            base=ComputeLoss, own={"compute_loss": twice}, on=ALL),
    ],
    5: [
        row("uncalled_compound_loss", "never called", "in `compute_loss`", COMPOUND,
            base=ComputeLoss, own={"compute_loss": unweighted}, loss=None,
            weights=lambda ours: None),
        row("metric_like_a_weight", "has ['easy_weight']. Rename that", trackers=["easy_weight"]),
        row("ignored_base_weights_beside_a_number", "under no weights", names={"easy": 2.0},
            weights=lambda ours: {**ours, "hard": 1.0}, **IGNORES),
        row("fit_in_a_thread", USED, "thread", "step({", run=begun_in_a_thread),
    ],
    15: [
        row("ignored_weights", "base weights", "super().comp", on=ALL, **IGNORES),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("most", "run", "message"),
    [
        pytest.param(most, run, message, id=case)
        for most, rows in MISWIRINGS.items()
        for case, run, message in itertools.chain(*rows)
    ],
)
def test_miswiring_says_what_was_found_and_what_to_write(most, run, message):
    reached.clear()
    with pytest.raises((ValueError, RuntimeError)) as raised:
        run()
    for part in message:
        assert part in str(raised.value)
    assert len(reached) <= most


def check_totals(*epochs):
    """Compares each epoch's total with the sum under its weights and that under static ones."""
    suspects = np.array([True])
    for total, weighted, static in epochs:
        suspects = static_sums(suspects, total, np.array([weighted]), np.array([static]), {})


@one_backend
def test_right_loss_that_is_near_the_sum_under_the_base_weights_is_no_alarm():
    # Other terms compensate for the weights once, but not in the epoch before.
    check_totals((2.1, 2.0, 2.0), (1.25, 1.2, 1.25))
    # The weights move by less than the sums can resolve.
    check_totals((1.5, 1.5, 1.5), (1.0, 1.0005, 1.0))
    # There is nothing left to learn.
    check_totals((1.5, 1.5, 1.5), (0.0, 0.0, 0.0))


@one_backend
def test_weights_that_do_not_reach_the_loss_are_found_after_an_epoch_of_nan():
    with pytest.raises(ValueError, match="do not reach the loss"):
        check_totals((math.nan, math.nan, math.nan), (2.0, 2.0, 2.0), (1.25, 1.2, 1.25))


@one_backend
def test_logs_without_the_losses_of_validation_cost_its_base_loss_alone():
    # As if a `test_step` returned only the total.
    logs, ones = {"val_loss": 3.0}, np.ones(2)
    message = add_val_base_loss(logs, NAMES, ones, ones, recorded=None, rest=None)
    assert "the logs lack ['val_easy_loss', 'val_hard_loss']" in message
    assert logs == {"val_loss": 3.0}


@deep_elsewhere
def test_fits_in_threads_each_move_their_own_weights():
    def work(_):
        dwa = new()
        return train(dict_model(), dwa), dwa

    with ThreadPoolExecutor(2) as pool:
        for history, dwa in pool.map(work, range(2)):
            check_run(history, dwa)
