"""Every kind of model that Keras has, every way to feed it, and every precision."""

from functools import partial

import keras
import numpy as np
import pytest
from common import (
    BACKEND,
    LOSSES,
    SAMPLES,
    TwoHeads,
    X,
    Y,
    check_run,
    dict_model,
    expected_weights,
    floatx,
    heads,
    train,
)

from keras_dwa import DynamicWeightAverage, LossWeighting


@pytest.fixture
def dwa():
    return DynamicWeightAverage(["easy", "hard"], temperature=0.2)


def model_of(arrange):
    """A functional model whose outputs are arranged by a function of the heads and the inputs."""
    inputs, outputs = heads()
    return keras.Model(inputs, arrange(outputs, inputs))


def shared_layers():
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    shared = keras.layers.Dense(5, activation="tanh")
    easy, hard = keras.layers.Dense(1)(shared(left)), keras.layers.Dense(2)(shared(right))
    return {"model": keras.Model([left, right], {"easy": easy, "hard": hard}), "x": [X, X[::-1]]}


def generator():
    def batches():
        while True:
            for start in range(0, SAMPLES, 8):
                batch = slice(start, start + 8)
                yield X[batch], {name: target[batch] for name, target in Y.items()}

    return {"x": batches(), "y": None, "steps_per_epoch": 3}


def loader_of_the_backend():
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return {"x": tf.data.Dataset.from_tensor_slices((X, Y)).batch(8), "y": None}
    torch = pytest.importorskip("torch")
    samples = [(x, {name: Y[name][i] for name in Y}) for i, x in enumerate(X)]
    return {"x": torch.utils.data.DataLoader(samples, batch_size=8), "y": None}


SAMPLE_WEIGHT = {"easy": np.linspace(0, 2, SAMPLES), "hard": np.linspace(3, 0, SAMPLES)}
CASES = {
    "list outputs with named layers": lambda: {
        "model": model_of(lambda outputs, _: [outputs["hard"], outputs["easy"]]),
        "y": [Y["hard"], Y["easy"]],
    },
    "dict with an output without a loss": lambda: {
        "model": model_of(lambda outputs, x: {**outputs, "more": keras.layers.Identity()(x)})
    },
    "subclassed model that fit builds": lambda: {"model": TwoHeads()},
    "shared layers": shared_layers,
    "sample weight per output": lambda: {"sample_weight": SAMPLE_WEIGHT},
    "validation of every second epoch": lambda: {"epochs": 4, "validation_freq": 2},
    "generator": generator,
    "loader of the backend": loader_of_the_backend,
    "gradient accumulation": lambda: {
        "optimizer": keras.optimizers.SGD(0.05, gradient_accumulation_steps=2)
    },
    # In a graph on TensorFlow, Keras averages an output's loss over batches, but `loss` over
    # samples, so that the one is no sum of the others there.
    "unequal batches": lambda: {"batch_size": 7, "mode": {"run_eagerly": BACKEND == "tensorflow"}},
}


@pytest.mark.parametrize("case", CASES)
def test_any_model_fed_in_any_way_trains_by_the_weights(dwa, case):
    arguments = {"model": dict_model(), "y": Y, **CASES[case]()}
    if arguments["y"] is None:
        arguments |= {"shuffle": False, "validation_data": (X, Y), "validation_batch_size": 8}
    else:
        arguments["validation_split"] = 0.2
    history = train(dwa=dwa, **arguments)
    check_run(history, dwa)
    validated = len(history["loss"]) // arguments.get("validation_freq", 1)
    assert len(history["val_loss"]) == len(history["val_base_loss"]) == validated


def test_model_is_locked_after_fit_if_it_was_before(dwa):
    subclassed, functional = TwoHeads(), dict_model()
    subclassed(X)
    for model in (functional, subclassed):
        check_run(train(model, dwa), dwa)
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        subclassed.another = keras.layers.Dense(1)
    functional.another = keras.metrics.Mean()
    assert functional.another in functional.metrics


FIT = {"batch_size": 8, "epochs": 3, "shuffle": False, "verbose": 0}


def test_nested_outputs_go_by_their_path():
    def nested(outputs, x):
        return {"body": {"easy": outputs["easy"], "third": keras.layers.Dense(1)(x)}, **outputs}

    model = model_of(nested)
    dwa = DynamicWeightAverage(["body/easy", "body/third", "hard"], temperature=0.2)
    weights = dwa.loss_weights
    body = {"easy": weights["body/easy"], "third": weights["body/third"]}
    losses = {"body": {"easy": "mse", "third": "mae"}, "hard": "mae"}
    weights = {"body": body, "hard": weights["hard"]}
    model.compile(keras.optimizers.SGD(0.05), losses, loss_weights=weights)
    targets = {"body": {"easy": Y["easy"], "third": Y["easy"] ** 2}, **Y}
    check_run(model.fit(X, targets, validation_split=0.2, callbacks=[dwa], **FIT).history, dwa)


def test_outputs_of_a_list_without_a_loss_have_none_for_loss_and_weight(dwa):
    more = keras.layers.Identity(name="more")
    model = model_of(lambda outputs, x: [outputs["easy"], more(x), outputs["hard"]])
    model.compile("sgd", {**LOSSES, "more": None}, loss_weights={**dwa.loss_weights, "more": None})
    check_run(model.fit(X, [Y["easy"], X, Y["hard"]], callbacks=[dwa], **FIT).history, dwa)


def fixed_weights(outputs, x):
    return {**outputs, "mask": keras.layers.Dense(1, name="mask")(x)}


@pytest.mark.parametrize("mask", [0.5, np.float32(0.5), 2])
def test_outputs_with_a_number_keep_it_and_count_in_base_loss(dwa, mask):
    model = model_of(fixed_weights)
    weights = {**dwa.loss_weights, "mask": mask}
    model.compile(keras.optimizers.SGD(0.05), {**LOSSES, "mask": "mse"}, loss_weights=weights)
    targets = {**Y, "mask": Y["easy"] + 1}
    history = model.fit(X, targets, validation_split=0.2, callbacks=[dwa], **FIT).history
    np.testing.assert_allclose(
        np.array([history["easy_weight"], history["hard_weight"]]).T,
        expected_weights(history, dwa, 0.2),
        rtol=1e-5,
    )
    assert abs(history["easy_weight"][2] - 1) > 1e-3
    for prefix in ("", "val_"):
        easy, hard, fixed = (np.array(history[f"{prefix}{n}_loss"]) for n in (*LOSSES, "mask"))
        moved = history["easy_weight"] * easy + history["hard_weight"] * hard
        np.testing.assert_allclose(history[f"{prefix}loss"], moved + mask * fixed, rtol=1e-5)
        base_loss = easy + hard + mask * fixed
        np.testing.assert_allclose(history[f"{prefix}base_loss"], base_loss, rtol=1e-5)


@pytest.mark.parametrize("sequence", [list, tuple])
def test_lists_of_losses_and_weights_go_by_the_order_of_the_outputs(dwa, sequence):
    """In an order that is not the alphabet's."""
    make_model = partial(model_of, lambda outputs, _: [outputs["hard"], outputs["easy"]])
    keras.utils.set_random_seed(0)
    weights = [dwa.loss_weights["hard"], dwa.loss_weights["easy"]]
    model = make_model()
    arguments = {"loss": sequence(["mae", "mse"]), "loss_weights": sequence(weights)}
    model.compile(keras.optimizers.SGD(0.05), **arguments)
    history = model.fit(X, [Y["hard"], Y["easy"]], callbacks=[dwa], **FIT).history
    check_run(history, dwa)
    keras.utils.set_random_seed(0)
    by_name = train(make_model(), dwa, y=[Y["hard"], Y["easy"]], shuffle=False)
    assert history == by_name


def test_list_may_have_a_number_and_an_output_without_a_loss(dwa):
    more = keras.layers.Identity(name="more")
    model = model_of(lambda outputs, x: [outputs["hard"], more(x), outputs["easy"]])
    dwa = DynamicWeightAverage(["hard"])
    model.compile("sgd", ["mae", None, "mse"], loss_weights=[dwa.loss_weights["hard"], None, 0.5])
    history = model.fit(X, [Y["hard"], X, Y["easy"]], callbacks=[dwa], **FIT).history
    total = np.array(history["hard_loss"]) + 0.5 * np.array(history["easy_loss"])
    np.testing.assert_allclose(history["loss"], total, rtol=1e-5)


class Constant(keras.layers.Layer):
    def call(self, inputs):
        self.add_loss(0.25 + 0 * keras.ops.sum(inputs))
        return inputs


def test_regularizers_and_add_loss_stay_unweighted():
    weighting = LossWeighting({"easy": 1.0, "hard": 0.5})
    weighting.assign({"easy": 2.0})
    inputs, outputs = heads(kernel_regularizer=keras.regularizers.L2(0.1), name="trunk")
    model = keras.Model(inputs, {**outputs, "easy": Constant()(outputs["easy"])})
    still = keras.optimizers.SGD(0.0)
    history = train(model, weighting, epochs=1, optimizer=still, validation_split=0.2)
    added = 0.1 * (model.get_layer("trunk").get_weights()[0] ** 2).sum() + 0.25
    for prefix in ("", "val_"):
        easy, hard = (history[f"{prefix}{name}_loss"][0] for name in LOSSES)
        loss, base_loss = history[f"{prefix}loss"], history[f"{prefix}base_loss"]
        np.testing.assert_allclose(loss, 2 * easy + 0.5 * hard + added, rtol=1e-5)
        np.testing.assert_allclose(base_loss, easy + 0.5 * hard + added, rtol=1e-5)


def test_metrics_are_not_weighted(dwa):
    metrics = {"easy": ["mse"], "hard": ["mae"]}
    history = train(dict_model(), dwa, mode={"metrics": metrics})
    for metric in ("easy_mse", "hard_mae"):
        np.testing.assert_allclose(history[metric], history[f"{metric[:4]}_loss"], rtol=1e-6)


def test_single_output_has_its_base_weight_and_takes_class_weight():
    # Keras takes class_weight for models of one output only.
    def fit(base_weight, *callbacks):
        keras.utils.set_random_seed(0)
        inputs, outputs = heads()
        model = keras.Model(inputs, keras.layers.Softmax(name="class")(outputs["hard"]))
        weights = callbacks[0].loss_weights if callbacks else {"class": base_weight}
        loss = {"class": "sparse_categorical_crossentropy"}
        model.compile(keras.optimizers.SGD(0.05), loss, loss_weights=weights)
        classes, class_weight = np.arange(SAMPLES) % 2, {0: 0.5, 1: 3.0}
        return model.fit(X, classes, class_weight=class_weight, callbacks=callbacks, **FIT).history

    with_dwa = fit(2.0, DynamicWeightAverage({"class": 2.0}))
    assert with_dwa["class_weight"] == [2.0] * 3
    np.testing.assert_allclose(with_dwa["loss"], fit(2.0)["loss"], rtol=1e-6)
    assert abs(with_dwa["loss"][0] / fit(1.0)["loss"][0] - 2) < 0.5


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_weights_have_the_dtype_of_floatx_at_any_precision(policy):
    dtype = "float64" if policy == "float64" else "float32"
    with floatx(dtype):
        keras.config.set_dtype_policy(policy)  # Until `clear_session`, after every test.
        dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
        history = train(dict_model(), dwa, validation_split=0.2)
    check_run(history, dwa)
    assert {weight.dtype for weight in dwa.loss_weights.values()} == {dtype}
