"""Loss weights that move while a Keras 3 model trains, on TensorFlow, JAX and torch."""

from keras_dwa._compound_loss import CompoundLoss
from keras_dwa._dynamic_weight_average import DynamicWeightAverage
from keras_dwa._formula import dwa_weights
from keras_dwa._loss_weight_scheduler import LossWeightScheduler
from keras_dwa._loss_weighting import LossWeighting
from keras_dwa._plotting import plot_history

__version__ = "0.2.0"

__all__ = [
    "CompoundLoss",
    "DynamicWeightAverage",
    "LossWeightScheduler",
    "LossWeighting",
    "dwa_weights",
    "plot_history",
]
