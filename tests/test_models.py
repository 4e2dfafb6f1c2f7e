"""Every kind of model that Keras has."""

import keras
import numpy as np
import pytest
from common import LOSSES, X, Y, check_run, dict_model, heads, train

from keras_dwa import DynamicWeightAverage


@pytest.fixture
def dwa():
    return DynamicWeightAverage(["easy", "hard"], temperature=0.2)


@keras.saving.register_keras_serializable("tests")
class TwoHeads(keras.Model):
    """A subclassed model with dict outputs."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.trunk = keras.layers.Dense(6, activation="tanh")
        self.easy = keras.layers.Dense(1)
        self.hard = keras.layers.Dense(2)

    def call(self, inputs):
        features = self.trunk(inputs)
        return {"easy": self.easy(features), "hard": self.hard(features)}


def test_dict_outputs(dwa, mode):
    check_run(train(dict_model(), dwa, mode=mode, validation_split=0.2), dwa)


def test_list_outputs_with_named_layers(dwa, mode):
    inputs, outputs = heads()
    model = keras.Model(inputs, [outputs["hard"], outputs["easy"]])
    targets = [Y["hard"], Y["easy"]]
    check_run(train(model, dwa, y=targets, mode=mode, validation_split=0.2), dwa)


@pytest.mark.torch_compile
def test_nested_outputs_go_by_their_path(mode):
    inputs, outputs = heads()
    third = keras.layers.Dense(1)(inputs)
    model = keras.Model(inputs, {"body": {"easy": outputs["easy"], "third": third}, **outputs})
    dwa = DynamicWeightAverage(["body/easy", "body/third", "hard"], temperature=0.2)
    targets = {"body": {"easy": Y["easy"], "third": Y["easy"] ** 2}, **Y}
    loss = {"body": {"easy": "mse", "third": "mae"}, "hard": "mae"}
    check_run(train(model, dwa, y=targets, loss=loss, mode=mode, validation_split=0.2), dwa)


def test_subclassed_model_that_fit_builds(dwa, mode):
    check_run(train(TwoHeads(), dwa, mode=mode, validation_split=0.2), dwa)


@pytest.mark.torch_compile
def test_subclassed_model_built_before_fit(dwa, mode):
    model = TwoHeads()
    model(X)
    check_run(train(model, dwa, mode=mode, validation_split=0.2), dwa)
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        model.another = keras.layers.Dense(1)  # Its tracker is locked again.


def test_outputs_without_a_loss_may_be_left_out_of_a_dict(dwa, mode):
    inputs, outputs = heads()
    outputs["features"] = keras.layers.Identity()(inputs)
    model = keras.Model(inputs, outputs)
    check_run(train(model, dwa, mode=mode, validation_split=0.2), dwa)


def test_outputs_of_a_list_without_a_loss_have_none_for_loss_and_weight(dwa):
    inputs, outputs = heads()
    features = keras.layers.Identity(name="features")(inputs)
    model = keras.Model(inputs, [outputs["easy"], features, outputs["hard"]])
    model.compile(
        optimizer="sgd",
        loss={**LOSSES, "features": None},
        loss_weights={**dwa.loss_weights, "features": None},
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


@pytest.mark.torch_compile
def test_regularizers_and_add_loss_stay_unweighted(dwa, mode):
    class Constant(keras.layers.Layer):
        def call(self, inputs):
            self.add_loss(0.25 + 0 * keras.ops.sum(inputs))
            return inputs

    penalties = []

    class Penalty(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            kernel = self.model.get_layer("trunk").get_weights()[0]
            penalties.append(0.1 * (kernel**2).sum() + 0.25)

    inputs, outputs = heads(kernel_regularizer=keras.regularizers.L2(0.1), name="trunk")
    model = keras.Model(inputs, {**outputs, "easy": Constant()(outputs["easy"])})
    model.compile(
        optimizer=keras.optimizers.SGD(0.05), loss=LOSSES, loss_weights=dwa.loss_weights, **mode
    )
    # One batch an epoch, so that the penalty is the one at the epoch's start.
    history = model.fit(X, Y, batch_size=40, epochs=5, verbose=0, callbacks=[dwa, Penalty()])
    check_run(history.history, dwa, regularization=np.array(penalties))


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
    assert weighted["base_loss"] == weighted["loss"]


def test_single_named_output_with_a_base_weight(mode):
    inputs, outputs = heads()
    model = keras.Model(inputs, {"easy": outputs["easy"]})
    dwa = DynamicWeightAverage({"easy": 3.0})
    targets = {"easy": Y["easy"]}
    history = train(model, dwa, y=targets, loss={"easy": "mse"}, mode=mode)
    assert history["easy_weight"] == [3.0] * 4
    assert history["base_loss"] == history["loss"]
