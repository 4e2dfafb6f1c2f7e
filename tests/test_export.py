"""Trained models exported for inference: they predict the same, without the package."""

import keras
import numpy as np
import pytest
from common import BACKEND, X, dict_model, train

from keras_dwa import DynamicWeightAverage

SAMPLE = X[:1]  # Keras exports a torch program for batches of one, unless told otherwise.


@pytest.fixture
def model():
    model = dict_model()
    train(model, DynamicWeightAverage(["easy", "hard"]), epochs=1)
    return model


def check_predicts(outputs, model):
    both = [keras.ops.convert_to_numpy(each["hard"]) for each in (outputs, model(SAMPLE))]
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras exports a SavedModel by TensorFlow")
def test_saved_model(model, tmp_path):
    import tensorflow as tf

    model.export(tmp_path / "saved_model", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved_model")
    check_predicts(loaded.serve(SAMPLE), model)


@pytest.mark.skipif(BACKEND != "torch", reason="Keras exports a torch program on torch")
# torch 2.11 warns about its own files.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_torch_program(model, tmp_path):
    import torch

    model.export(tmp_path / "model.pt2", format="torch", verbose=False)
    program = torch.export.load(tmp_path / "model.pt2").module()
    check_predicts(program(keras.ops.convert_to_tensor(SAMPLE)), model)
