"""A training run that resumes from its backup, for tests to kill."""

import os
import signal
import warnings

import keras
import numpy as np
from common import LOSSES, NAMES, X, Y, heads

from keras_dwa import DynamicWeightAverage


class Stop(keras.callbacks.Callback):
    """Ends the run after a batch: kills its process, or raises an error."""

    def __init__(self, epoch, batch, kill=False):
        super().__init__()
        self.at, self.kill = (epoch, batch), kill

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt


def train(folder, save_freq="epoch", kill_at=None):
    """Trains six epochs of five batches, and writes the results. `kill_at` is an epoch, a batch."""
    warnings.simplefilter("error", UserWarning)
    keras.utils.set_random_seed(0)
    folder.mkdir(exist_ok=True)
    inputs, outputs = heads()
    normalized = {name: keras.layers.BatchNormalization()(y) for name, y in outputs.items()}
    model = keras.Model(inputs, normalized)
    dwa = DynamicWeightAverage(NAMES, temperature=0.1)
    model.compile(keras.optimizers.Adam(0.02), LOSSES, loss_weights=dwa.loss_weights)
    callbacks = [
        dwa,
        keras.callbacks.CSVLogger(folder / "log.csv", append=True),
        keras.callbacks.BackupAndRestore(folder / "backup", save_freq),
    ]
    if kill_at:
        callbacks.append(Stop(*kill_at, kill=True))
    model.fit(X, Y, batch_size=8, epochs=6, shuffle=False, verbose=0, callbacks=callbacks)
    trained = [*model.variables, *model.optimizer.variables, *dwa.variables]
    arrays = [keras.ops.convert_to_numpy(variable) for variable in trained]
    np.savez(folder / "trained.npz", *arrays, **dwa.state)
