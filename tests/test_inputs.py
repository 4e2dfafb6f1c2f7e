"""Every way to feed `fit`, and every precision."""

import keras
import numpy as np
import pytest
from common import BACKEND, SAMPLES, X, Y, check_run, dict_model, floatx, heads, train

from keras_dwa import DynamicWeightAverage


@pytest.fixture
def dwa():
    return DynamicWeightAverage(["easy", "hard"], temperature=0.2)


def test_sample_weight_per_output(dwa, mode):
    weights = {"easy": np.linspace(0, 2, SAMPLES), "hard": np.linspace(3, 0, SAMPLES)}
    history = train(dict_model(), dwa, sample_weight=weights, mode=mode, validation_split=0.2)
    check_run(history, dwa)


def test_class_weight_of_a_single_output(mode):
    # Keras takes class_weight for models of one output only.
    def losses(base_weight, dwa=None):
        keras.utils.set_random_seed(0)
        inputs, outputs = heads()
        model = keras.Model(inputs, keras.layers.Softmax(name="class")(outputs["hard"]))
        weights = dwa.loss_weights if dwa else {"class": base_weight}
        loss = {"class": "sparse_categorical_crossentropy"}
        model.compile(keras.optimizers.SGD(0.05), loss, loss_weights=weights, **mode)
        return model.fit(
            X,
            np.arange(SAMPLES) % 2,
            class_weight={0: 0.5, 1: 3.0},
            batch_size=8,
            epochs=3,
            shuffle=False,
            verbose=0,
            callbacks=[dwa] if dwa else [],
        ).history["loss"]

    with_dwa = losses(2.0, DynamicWeightAverage({"class": 2.0}))
    np.testing.assert_allclose(with_dwa, losses(2.0), rtol=1e-6)
    assert abs(with_dwa[0] / losses(1.0)[0] - 2) < 0.5


def test_masks(dwa, mode):
    tokens = np.arange(SAMPLES * 5).reshape(SAMPLES, 5) % 7  # 0 is masked.
    inputs = keras.Input((5,), dtype="int32")
    features = keras.layers.Embedding(7, 3, mask_zero=True)(inputs)
    model = keras.Model(
        inputs, {"easy": keras.layers.Dense(1)(features), "hard": keras.layers.Dense(2)(features)}
    )
    targets = {"easy": tokens[..., None] / 7, "hard": np.sin([tokens, tokens]).transpose(1, 2, 0)}
    check_run(train(model, dwa, tokens, targets, mode=mode, validation_split=0.2), dwa)


def test_validation_of_every_second_epoch(dwa, mode):
    history = train(dict_model(), dwa, epochs=4, mode=mode, validation_split=0.2, validation_freq=2)
    assert len(history["val_loss"]) == len(history["val_base_loss"]) == 2
    check_run(history, dwa)


def test_generator_with_steps_per_epoch(dwa, mode):
    def batches():
        while True:
            for start in range(0, SAMPLES, 8):
                batch = slice(start, start + 8)
                yield X[batch], {name: target[batch] for name, target in Y.items()}

    check_run(
        train(dict_model(), dwa, batches(), None, steps_per_epoch=3, shuffle=False, mode=mode), dwa
    )


def test_py_dataset(dwa, mode):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return SAMPLES // 8

        def __getitem__(self, index):
            batch = slice(index * 8, index * 8 + 8)
            return X[batch], {name: target[batch] for name, target in Y.items()}

    check_run(train(dict_model(), dwa, Batches(), None, mode=mode, shuffle=False), dwa)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.data comes with TensorFlow")
def test_tf_data(dwa, mode):
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    fit = {"shuffle": False, "validation_data": data.take(2)}
    check_run(train(dict_model(), dwa, data, None, mode=mode, **fit), dwa)


@pytest.mark.skipif(BACKEND != "torch", reason="DataLoader comes with torch")
def test_data_loader(dwa, mode):
    import torch

    samples = [(x, {name: Y[name][i] for name in Y}) for i, x in enumerate(X)]
    loader = torch.utils.data.DataLoader(samples, batch_size=8)
    fit = {"shuffle": False, "validation_data": loader}
    check_run(train(dict_model(), dwa, loader, None, mode=mode, **fit), dwa)


def test_gradient_accumulation(dwa, mode):
    optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=2)
    check_run(train(dict_model(), dwa, optimizer=optimizer, mode=mode), dwa)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(dwa, mode, policy):
    keras.config.set_dtype_policy(policy)
    try:
        history = train(dict_model(), dwa, mode=mode, validation_split=0.2)
    finally:
        keras.config.set_dtype_policy("float32")
    check_run(history, dwa)
    assert all(weight.dtype == "float32" for weight in dwa.loss_weights.values())


def test_float64(mode):
    with floatx("float64"):
        dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.2)
        history = train(dict_model(), dwa, mode=mode, validation_split=0.2)
    check_run(history, dwa)
    assert all(weight.dtype == "float64" for weight in dwa.loss_weights.values())


def test_unequal_batches(dwa):
    # In a graph on TensorFlow, Keras averages an output's loss over batches, but `loss` over
    # samples, so that the one is no sum of the others there.
    mode = {"run_eagerly": BACKEND == "tensorflow"}
    check_run(train(dict_model(), dwa, batch_size=7, validation_split=0.2, mode=mode), dwa)
