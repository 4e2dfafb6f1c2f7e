"""One run of the study: a family, a method, a seed."""

import functools
import math

import keras
from families import FAMILIES
from methods import METHODS

from keras_dwa import LossWeighting

PARTS = ("val", "test")


class Score(keras.callbacks.Callback):
    """Notes weights, losses and the metrics of validation and test after each epoch.

    Args:
        family: what is trained.
        tasks: those of its tasks that the model has.
        x, targets: of validation and test.
        parts: name to slice, of these.
    """

    def __init__(self, family, tasks, x, targets, parts):
        super().__init__()
        self.family, self.tasks, self.rows = family, tasks, []
        self.x, self.targets, self.parts = x, targets, parts

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch + 1, "val_base_loss": logs["val_base_loss"]}
        for task in self.tasks:
            row[f"{task}: weight"] = logs[f"{task}_weight"]
            # Keras logs that of a single output as the total alone.
            row[f"{task}: loss"] = logs.get(f"{task}_loss", logs["loss"])
        predicted = self.model.predict(self.x, batch_size=len(self.x), verbose=0)
        for part, which in self.parts.items():
            predictions, targets = (
                {name: values[which] for name, values in both.items()}
                for both in (predicted, self.targets)
            )
            for metric, value in self.family.metrics(predictions, targets).items():
                row[f"{metric}: {part}"] = value
        self.rows.append(row)


def columns(family):
    """Those of a family's results."""
    of_tasks = [f"{task}: {what}" for task in family.tasks for what in ("weight", "loss")]
    of_metrics = [f"{metric}: {part}" for metric in family.metric_names for part in PARTS]
    return ["method", "seed", "epoch", "rate", "val_base_loss", *of_tasks, *of_metrics]


@functools.cache
def load(name):
    return FAMILIES[name].data()


def train(name, method, seed, rate, weights=None, epochs=None):
    """The rows of a run, one for each epoch.

    Args:
        name: that of the family.
        method: one of `METHODS`, or a name of anything that is trained with static weights. With
            "adapt" in its name, it adapts first.
        seed: that of the initial weights, of the batches and of random weights.
        rate: the learning rate.
        weights: task to static weight, for a method that is not one of `METHODS`; 1 if None.
        epochs: as many as the family has, if None.
    """
    family = FAMILIES[name]
    tasks = family.references.get(method, family.tasks)
    x, targets = load(name)
    first, last = family.samples[0], sum(family.samples)

    def data(which, names):
        return x[which], {name: targets[name][which] for name in names}

    # The terms of the VAE have no targets.
    trained = [task for task in tasks if task in targets]
    keras.utils.set_random_seed(seed)
    if method in METHODS:
        weighting = METHODS[method](tasks, math.ceil(first / family.batch), seed)
    else:
        weighting = LossWeighting(weights or tasks)
    model = family.compiled(tasks, weighting, rate)
    if "adapt" in method:
        weighting.adapt(model, *data(slice(first), trained), batch_size=family.batch)
    unseen, parts = slice(first, None), (slice(last - first), slice(last - first, None))
    score = Score(family, tasks, *data(unseen, targets), dict(zip(PARTS, parts, strict=True)))
    model.fit(
        *data(slice(first), trained),
        batch_size=family.batch,
        epochs=epochs or family.epochs,
        validation_data=data(slice(first, last), trained),
        verbose=0,
        callbacks=[weighting, score],
    )
    return [{"method": method, "seed": seed, "rate": rate, **row} for row in score.rows]
