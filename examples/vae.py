"""A variational autoencoder whose reconstruction and KL divergence are weighted under `fit`.

    python examples/vae.py

trains it by Dynamic Weight Average, and with an annealed KL divergence: off for two epochs, then
up to its full weight. The two terms are not outputs with targets of their own, so that
`compile(loss_weights=...)` cannot weight them: `compute_loss` combines them instead. The backend is
the one that KERAS_BACKEND names: tensorflow, jax (if it is unset) or torch.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
from keras import ops
from sklearn.datasets import load_digits

from keras_dwa import CompoundLoss, DynamicWeightAverage, LossWeightScheduler


class VAE(keras.Model):
    def __init__(self, weighting, latent_size=4):
        super().__init__()
        self.encoder = keras.Sequential(
            [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(2 * latent_size)]
        )
        self.decoder = keras.Sequential(
            [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(64)]
        )
        self.seed = keras.random.SeedGenerator(0)
        self.compound = CompoundLoss(["reconstruction", "kl"], weighting)

    def call(self, images):
        mean, log_variance = ops.split(self.encoder(images), 2, axis=-1)
        noise = keras.random.normal(ops.shape(mean), seed=self.seed)
        code = mean + noise * ops.exp(0.5 * log_variance)
        return {"logits": self.decoder(code), "mean": mean, "log_variance": log_variance}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        mean, log_variance = y_pred["mean"], y_pred["log_variance"]
        pixels = ops.binary_crossentropy(x, y_pred["logits"], from_logits=True)
        divergence = -0.5 * (1 + log_variance - ops.square(mean) - ops.exp(log_variance))
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


def train(weighting, images, epochs):
    keras.utils.set_random_seed(0)
    vae = VAE(weighting)
    vae.compile(optimizer=keras.optimizers.Adam(3e-3))
    history = vae.fit(
        images, epochs=epochs, batch_size=64, validation_split=0.2, verbose=0, callbacks=[weighting]
    ).history

    print(f"\n{type(weighting).__name__}")
    print("epoch | reconstruction  weight |     KL  weight | validation, base weights")
    for epoch in range(epochs):
        at = {key: values[epoch] for key, values in history.items()}
        print(
            f"{epoch + 1:5} | {at['reconstruction_loss']:14.3f} {at['reconstruction_weight']:7.3f}"
            f" | {at['kl_loss']:6.3f} {at['kl_weight']:7.3f} | {at['val_base_loss']:.3f}"
        )


def main(epochs):
    images = (load_digits().data / 16).astype("float32")
    terms = ["reconstruction", "kl"]
    train(DynamicWeightAverage(terms), images, epochs)
    train(LossWeightScheduler(terms, anneal), images, epochs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
