"""A training run that resumes from its backup, for tests to kill."""

import signal
import warnings

import keras
import numpy as np
from common import LOSSES, X, Y, heads

from keras_dwa import DynamicWeightAverage


class Stop(keras.callbacks.Callback):
    """Ends the run after a batch: sets `reached` and waits to be killed, or raises an error."""

    def __init__(self, epoch, batch, reached=None):
        super().__init__()
        self.at, self.reached = (epoch, batch), reached

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            if self.reached is None:
                raise KeyboardInterrupt
            self.reached.set()
            signal.pause()


def train(folder, update_freq="epoch", save_freq="epoch", stop=None):
    """Trains six epochs of five batches, and writes the results.

    `stop` is an epoch, a batch, and an event to set by then: there, the run waits to be killed.
    """
    warnings.simplefilter("error", UserWarning)
    keras.utils.set_random_seed(0)
    folder.mkdir(exist_ok=True)
    inputs, outputs = heads()
    normalized = {name: keras.layers.BatchNormalization()(y) for name, y in outputs.items()}
    model = keras.Model(inputs, normalized)
    dwa = DynamicWeightAverage(["easy", "hard"], 0.1, update_freq)
    model.compile(keras.optimizers.Adam(0.02), LOSSES, loss_weights=dwa.loss_weights)
    callbacks = [
        dwa,
        keras.callbacks.CSVLogger(folder / "log.csv", append=True),
        keras.callbacks.BackupAndRestore(folder / "backup", save_freq),
    ]
    if stop:
        callbacks.append(Stop(*stop))
    model.fit(X, Y, batch_size=8, epochs=6, shuffle=False, verbose=0, callbacks=callbacks)
    trained = [*model.variables, *model.optimizer.variables, *dwa.variables]
    arrays = [keras.ops.convert_to_numpy(variable) for variable in trained]
    np.savez(folder / "trained.npz", *arrays, **dwa.state)
