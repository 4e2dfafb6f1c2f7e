"""A variational autoencoder under `fit`: the KL term fixed, small or annealed.

    python examples/vae.py

You will see the reconstruction and the KL divergence that three ways to weight
the KL term reach on unseen digits: the weight 1; the base weight 0.25; and
annealing, from 0 to 1 within seven epochs. Takes under a minute on two CPU
cores. The last line says which has the best bound (negative ELBO: the sum of
both terms). vae.png shows the terms over the epochs, and a few images (needs
matplotlib).

The terms are not outputs with targets, so `compile(loss_weights=...)` cannot
weight them: `compute_loss` combines them instead. The backend is the one that
KERAS_BACKEND names: tensorflow, jax (if it is unset) or torch.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras import ops
from sklearn.datasets import load_digits

from keras_dwa import CompoundLoss, LossWeighting, LossWeightScheduler

TERMS = ["reconstruction", "kl"]
TRAIN = 22 * 64


class VAE(keras.Model):
    def __init__(self, weighting, latent_size=4):
        super().__init__()
        self.encoder = keras.Sequential(
            [
                keras.layers.Dense(64, activation="relu"),
                keras.layers.Dense(2 * latent_size),
            ]
        )
        self.decoder = keras.Sequential(
            [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(64)]
        )
        self.seed = keras.random.SeedGenerator(0)
        self.compound = CompoundLoss(TERMS, weighting)

    def call(self, images):
        mean, log_variance = ops.split(self.encoder(images), 2, axis=-1)
        noise = keras.random.normal(ops.shape(mean), seed=self.seed)
        code = mean + noise * ops.exp(0.5 * log_variance)
        return {
            "logits": self.decoder(code),
            "mean": mean,
            "log_variance": log_variance,
        }

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        mean, log_variance = y_pred["mean"], y_pred["log_variance"]
        pixels = ops.binary_crossentropy(x, y_pred["logits"], from_logits=True)
        divergence = -0.5 * (
            1 + log_variance - ops.square(mean) - ops.exp(log_variance)
        )
        return self.compound.combine(
            {
                "reconstruction": ops.mean(ops.sum(pixels, axis=-1)),
                "kl": ops.mean(ops.sum(divergence, axis=-1)),
            },
            samples=ops.shape(x)[0],
        )


def anneal(epoch, factors):
    """0 for two epochs, then in five steps to 1."""
    return {"kl": min(1.0, max(0, epoch - 1) / 5)}


def train(weighting, images, epochs, callbacks):
    """The trained VAE and its history; all have the same start and batches."""
    keras.utils.set_random_seed(0)
    vae = VAE(weighting)
    vae.compile(optimizer=keras.optimizers.Adam(3e-3))
    history = vae.fit(
        images[:TRAIN],
        epochs=epochs,
        batch_size=64,
        validation_data=(images[TRAIN:],),
        verbose=0,
        callbacks=[weighting, *callbacks],
    )
    return vae, history.history


def save_picture(path, models, histories, images):
    """The terms over the epochs, and images before and after the VAE."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No picture: it needs matplotlib.")
        return
    figure = Figure((9, 5.4), layout="constrained")
    curves, examples = figure.subfigures(2, 1, height_ratios=(3, 2))
    for panel, term in zip(curves.subplots(1, 2), TERMS, strict=True):
        for name, history in histories.items():
            values = history[f"val_{term}_loss"]
            panel.plot(range(1, 1 + len(values)), values, label=name)
        panel.set(title=f"{term} on unseen digits, in nats", xlabel="epoch")
        panel.legend(frameon=False)
    shown = images[TRAIN : TRAIN + 10]
    rows = {"image": shown}
    for name, model in models.items():
        logits = model.predict(shown, verbose=0)["logits"]
        rows[name] = 1 / (1 + np.exp(-logits))
    for panel, (name, row) in zip(
        examples.subplots(2, 2).flat, rows.items(), strict=True
    ):
        picture = row.reshape(10, 8, 8).transpose(1, 0, 2).reshape(8, 80)
        panel.imshow(picture, cmap="gray_r")
        panel.set_title(name)
        panel.set_axis_off()
    figure.savefig(path, dpi=110)
    print(f"Picture: {os.path.abspath(path)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--picture", default="vae.png", metavar="FILE")
    arguments = parser.parse_args()
    epochs = arguments.epochs
    print(
        f"Keras {keras.__version__} on {keras.backend.backend()}: "
        f"three VAEs, {epochs} epochs each",
        flush=True,
    )

    weightings = {
        "weight 1": LossWeighting(TERMS),
        "weight 0.25": LossWeighting({"reconstruction": 1.0, "kl": 0.25}),
        "annealed": LossWeightScheduler(TERMS, anneal),
    }
    progress = keras.utils.Progbar(3 * epochs, unit_name="epoch")
    show = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: progress.add(1)
    )
    images = (load_digits().data / 16).astype("float32")
    models, histories = {}, {}
    for name, weighting in weightings.items():
        models[name], histories[name] = train(weighting, images, epochs, [show])

    print("\non unseen digits | reconstruction |     KL | negative ELBO")
    bounds = {}
    for name, history in histories.items():
        reconstruction, kl = (history[f"val_{term}_loss"][-1] for term in TERMS)
        bounds[name] = reconstruction + kl
        print(
            f"{name:16} | {reconstruction:14.3f} | {kl:6.3f}"
            f" | {bounds[name]:13.3f}"
        )
    if arguments.picture:
        save_picture(arguments.picture, models, histories, images)
    best, worst = min(bounds, key=bounds.get), max(bounds, key=bounds.get)
    print(
        f"The best bound is that of {best}, {bounds[best]:.2f} nats;"
        f" the others are up to {bounds[worst] - bounds[best]:.2f} above it."
    )


if __name__ == "__main__":
    main()
