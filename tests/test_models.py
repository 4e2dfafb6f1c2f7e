"""Every kind of model that Keras has."""

import keras
import numpy as np
import pytest
from common import LOSSES, TwoHeads, X, Y, check_run, dict_model, heads, train

from keras_dwa import DynamicWeightAverage


@pytest.fixture
def dwa():
    return DynamicWeightAverage(["easy", "hard"], temperature=0.2)


def test_dict_outputs(dwa, mode):
    check_run(train(dict_model(), dwa, mode=mode, validation_split=0.2), dwa)


def test_list_outputs_with_named_layers(dwa, mode):
    inputs, outputs = heads()
    model = keras.Model(inputs, [outputs["hard"], outputs["easy"]])
    targets = [Y["hard"], Y["easy"]]
    check_run(train(model, dwa, y=targets, mode=mode, validation_split=0.2), dwa)


def test_nested_outputs_go_by_their_path(mode):
    inputs, outputs = heads()
    third = keras.layers.Dense(1)(inputs)
    model = keras.Model(inputs, {"body": {"easy": outputs["easy"], "third": third}, **outputs})
    dwa = DynamicWeightAverage(["body/easy", "body/third", "hard"], temperature=0.2)
    targets = {"body": {"easy": Y["easy"], "third": Y["easy"] ** 2}, **Y}
    loss = {"body": {"easy": "mse", "third": "mae"}, "hard": "mae"}
    weights = dwa.loss_weights
    model.compile(
        keras.optimizers.SGD(0.05),
        loss,
        loss_weights={
            "body": {"easy": weights["body/easy"], "third": weights["body/third"]},
            "hard": weights["hard"],
        },
        **mode,
    )
    fit = {"batch_size": 8, "epochs": 4, "verbose": 0, "validation_split": 0.2}
    check_run(model.fit(X, targets, callbacks=[dwa], **fit).history, dwa)


def test_subclassed_model_that_fit_builds(dwa, mode):
    check_run(train(TwoHeads(), dwa, mode=mode, validation_split=0.2), dwa)


def test_subclassed_model_built_before_fit(dwa, mode):
    model = TwoHeads()
    model(X)
    check_run(train(model, dwa, mode=mode, validation_split=0.2), dwa)
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        model.another = keras.layers.Dense(1)  # Its tracker is locked again.


def test_functional_model_takes_new_attributes_afterwards(dwa):
    model = dict_model()
    train(model, dwa, epochs=1)
    model.another = keras.metrics.Mean()
    assert model.another in model.metrics


def test_outputs_without_a_loss_may_be_left_out_of_a_dict(dwa, mode):
    inputs, outputs = heads()
    outputs["features"] = keras.layers.Identity()(inputs)
    model = keras.Model(inputs, outputs)
    check_run(train(model, dwa, mode=mode, validation_split=0.2), dwa)


def test_outputs_of_a_list_without_a_loss_have_none_for_loss_and_weight(dwa, mode):
    inputs, outputs = heads()
    features = keras.layers.Identity(name="features")(inputs)
    model = keras.Model(inputs, [outputs["easy"], features, outputs["hard"]])
    model.compile(
        optimizer="sgd",
        loss={**LOSSES, "features": None},
        loss_weights={**dwa.loss_weights, "features": None},
        **mode,
    )
    targets = [Y["easy"], X, Y["hard"]]
    history = model.fit(X, targets, batch_size=8, epochs=4, verbose=0, callbacks=[dwa]).history
    check_run(history, dwa)


def test_shared_layers(dwa, mode):
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    shared = keras.layers.Dense(5, activation="tanh")
    outputs = {
        "easy": keras.layers.Dense(1)(shared(left)),
        "hard": keras.layers.Dense(2)(shared(right)),
    }
    model = keras.Model([left, right], outputs)
    check_run(train(model, dwa, x=[X, X[::-1].copy()], mode=mode, validation_split=0.2), dwa)


def test_regularizers_and_add_loss_stay_unweighted(dwa, mode):
    class Constant(keras.layers.Layer):
        def call(self, inputs):
            self.add_loss(0.25 + 0 * keras.ops.sum(inputs))
            return inputs

    def penalty(model):
        kernel = model.get_layer("trunk").get_weights()[0]
        return 0.1 * (kernel**2).sum() + 0.25

    penalties = []

    class Penalties(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            penalties.append(penalty(self.model))

    inputs, outputs = heads(kernel_regularizer=keras.regularizers.L2(0.1), name="trunk")
    model = keras.Model(inputs, {**outputs, "easy": Constant()(outputs["easy"])})
    model.compile(
        optimizer=keras.optimizers.SGD(0.05), loss=LOSSES, loss_weights=dwa.loss_weights, **mode
    )
    # One batch an epoch, so that the penalty is the one at the epoch's start, and in validation
    # the one at its end.
    history = model.fit(
        X,
        Y,
        batch_size=40,
        epochs=5,
        verbose=0,
        validation_data=(X, Y),
        callbacks=[dwa, Penalties()],
    ).history
    penalties.append(penalty(model))
    for prefix, added in (("", penalties[:-1]), ("val_", penalties[1:])):
        parts = {name: np.array(history[f"{prefix}{name}_loss"]) for name in LOSSES}
        weighted = sum(parts[name] * history[f"{name}_weight"] for name in LOSSES)
        np.testing.assert_allclose(history[f"{prefix}loss"], weighted + added, rtol=1e-5)
        unweighted = parts["easy"] + parts["hard"]
        np.testing.assert_allclose(history[f"{prefix}base_loss"], unweighted + added, rtol=1e-5)
    assert abs(history["easy_weight"][4] - 1) > 1e-3


def test_metrics_are_as_without(mode):
    def accuracies(dwa=None):
        keras.utils.set_random_seed(0)
        model = dict_model()
        weights = dwa.loss_weights if dwa else None
        metrics = {"easy": ["mae"], "hard": ["mse"]}
        model.compile(
            keras.optimizers.SGD(0.0), LOSSES, loss_weights=weights, metrics=metrics, **mode
        )
        fit = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
        return model.fit(X, Y, callbacks=[dwa] if dwa else [], **fit).history

    without = accuracies()
    with_dwa = accuracies(DynamicWeightAverage(["easy", "hard"]))
    for key, values in without.items():
        np.testing.assert_allclose(with_dwa[key], values, rtol=1e-6)


def test_single_output_has_weight_one_and_trains_as_without(mode):
    def losses(dwa=None):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(1)])
        weights = dwa.loss_weights if dwa else None
        model.compile(optimizer="sgd", loss="mse", loss_weights=weights, **mode)
        callbacks = [dwa] if dwa else []
        return model.fit(
            X, Y["easy"], batch_size=8, epochs=4, verbose=0, shuffle=False, callbacks=callbacks
        ).history

    weighted = losses(DynamicWeightAverage(["output"]))
    np.testing.assert_allclose(weighted["loss"], losses()["loss"], rtol=1e-6)
    assert weighted["output_weight"] == [1.0] * 4


def test_single_named_output_with_a_base_weight(mode):
    def history_with(base_weight):
        keras.utils.set_random_seed(0)
        inputs, outputs = heads()
        model = keras.Model(inputs, {"easy": outputs["easy"]})
        dwa = DynamicWeightAverage({"easy": base_weight})
        fit = {"epochs": 2, "mode": mode, "optimizer": keras.optimizers.SGD(0.0)}
        return train(model, dwa, y={"easy": Y["easy"]}, loss={"easy": "mse"}, **fit)

    history = history_with(3.0)
    assert history["easy_weight"] == [3.0] * 2
    np.testing.assert_allclose(history["loss"], 3 * np.array(history_with(1.0)["loss"]), rtol=1e-5)
