"""A training run that resumes from its backup, for tests to kill."""

import signal
import warnings

import keras
import numpy as np
from common import LOSSES, X, Y, heads

from keras_dwa import DynamicWeightAverage


class Stop(keras.callbacks.Callback):
    """Ends the run after a batch: waits to be killed, having set `reached`, or raises."""

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


class Momentum(DynamicWeightAverage):
    """Keeps an array of its own beside those of Dynamic Weight Average, and changes it in place."""

    def update(self, epoch, logs):
        new, former = super().update(epoch, logs), self.factors
        if new is None:
            return None
        velocity = self.state.setdefault("velocity", np.zeros(len(new)))
        velocity *= 0.5
        velocity += [0.5 * (new[name] - former[name]) for name in sorted(new)]
        return {name: abs(former[name] + v) for name, v in zip(sorted(new), velocity, strict=True)}


class InWindows(Momentum):
    """Moves the weights within epochs, by windows that go over their ends."""

    def __init__(self, outputs, temperature):
        super().__init__(outputs, temperature, update_freq=7)


def train(folder, save_freq, rule=Momentum, stop=None):
    """Trains six epochs of five batches, and writes all that was trained.

    `stop` is an epoch and a batch, and where the run is to be killed, an event to set by then.
    Without it, the run gives the epoch up there, and trains it again from the state that it has.
    """
    warnings.simplefilter("error", UserWarning)
    keras.utils.set_random_seed(0)
    inputs, outputs = heads()
    normalized = {name: keras.layers.BatchNormalization()(y) for name, y in outputs.items()}
    model = keras.Model(inputs, normalized)
    dwa = rule(["easy", "hard"], temperature=0.1)
    model.compile(keras.optimizers.Adam(0.02), LOSSES, loss_weights=dwa.loss_weights)
    log = keras.callbacks.CSVLogger(folder / "log.csv", append=True)
    backup = keras.callbacks.BackupAndRestore(folder / "backup", save_freq)

    def fit(*callbacks, initial_epoch=0):
        callbacks = [dwa, log, *callbacks]
        arguments = {"batch_size": 8, "shuffle": False, "verbose": 0, "callbacks": callbacks}
        model.fit(X, Y, epochs=6, initial_epoch=initial_epoch, **arguments)

    try:
        fit(backup, *([Stop(*stop)] if stop else []))
    except KeyboardInterrupt:
        fit(initial_epoch=stop[0])
    trained = [*model.variables, *model.optimizer.variables, *dwa.variables]
    arrays = [keras.ops.convert_to_numpy(variable) for variable in trained]
    np.savez(folder / "trained.npz", *arrays, **dwa.state)
