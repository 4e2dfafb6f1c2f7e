"""Dynamic Weight Average for the losses of multi-output Keras 3 models."""

from keras_dwa.callback import DynamicWeightAverage
from keras_dwa.compound_loss import CompoundLoss
from keras_dwa.formula import dwa_weights

__version__ = "0.1.0"

__all__ = ["CompoundLoss", "DynamicWeightAverage", "dwa_weights"]
