"""A training run that resumes from its backup, for tests to kill.

    python run_to_kill.py FOLDER SAVE_FREQ [EPOCH BATCH {wait,continue}]

At the end of that batch it either says so and waits to be killed; or, as what Keras can resume,
gives the epoch up and trains it again in the same process, from the state that it has. At the end
it writes all that it trained.
"""

import signal
import sys
from pathlib import Path

import keras
import numpy as np
from common import LOSSES, X, Y, heads

from keras_dwa import DynamicWeightAverage


class Stop(keras.callbacks.Callback):
    def __init__(self, epoch, batch, how):
        super().__init__()
        self.at, self.how = (int(epoch), int(batch)), how

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            if self.how == "wait":
                print("ready", flush=True)
                signal.pause()
            raise KeyboardInterrupt


def main(folder, save_freq, *stop):
    folder = Path(folder)
    keras.utils.set_random_seed(0)
    inputs, outputs = heads()
    normalized = {name: keras.layers.BatchNormalization()(y) for name, y in outputs.items()}
    model = keras.Model(inputs, normalized)
    dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.1)
    model.compile(keras.optimizers.Adam(0.02), LOSSES, loss_weights=dwa.loss_weights)
    log = keras.callbacks.CSVLogger(folder / "log.csv", append=True)
    backup = keras.callbacks.BackupAndRestore(
        folder / "backup", save_freq if save_freq == "epoch" else int(save_freq)
    )

    def fit(*callbacks, initial_epoch=0):
        callbacks = [dwa, log, *callbacks]
        arguments = {"batch_size": 8, "shuffle": False, "verbose": 0, "callbacks": callbacks}
        model.fit(X, Y, epochs=6, initial_epoch=initial_epoch, **arguments)

    if stop and stop[-1] == "continue":
        try:
            fit(backup, Stop(*stop))
        except KeyboardInterrupt:
            fit(initial_epoch=int(stop[0]))
    else:
        fit(backup, *[Stop(*stop)] if stop else [])
    trained = [*model.variables, *model.optimizer.variables, *dwa.variables]
    np.savez(folder / "trained.npz", *[keras.ops.convert_to_numpy(v) for v in trained])


if __name__ == "__main__":
    main(*sys.argv[1:])
