"""Loss weights on all devices there are, or on two simulated ones.

    python examples/data_parallel.py

You will see a line for each epoch, with the weights of two tasks on noisy
handwritten digits: which digit, and the clean image. Each device has its share
of every batch, and the weights follow the losses over all of them. Takes 10 to
40 seconds on two CPU cores, most of it to start.

On JAX and TensorFlow, `fit` trains under `keras.distribution` and
`tf.distribute`. On torch, each device has its own process with a loop under
`DistributedDataParallel`. The backend is the one that KERAS_BACKEND names:
tensorflow, jax (if it is unset) or torch.
"""

import argparse
import os
import tempfile

os.environ.setdefault("KERAS_BACKEND", "jax")
# For JAX on a CPU; it reads this before it starts.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import keras
import numpy as np
from sklearn.datasets import load_digits

from keras_dwa import CompoundLoss, DynamicWeightAverage

LOSSES = {"digit": "sparse_categorical_crossentropy", "clean": "mse"}


def noisy_digits():
    """Images under noise; the targets are the digit and the clean image."""
    digits = load_digits()
    clean = (digits.data / 16).astype("float32")
    noise = np.random.default_rng(0).normal(0, 0.3, size=clean.shape)
    targets = {"digit": digits.target, "clean": clean}
    return (clean + noise).astype("float32"), targets


def build_model():
    image = keras.Input((64,))
    trunk = keras.layers.Dense(128, activation="relu")(image)
    digit = keras.layers.Dense(10, activation="softmax")(trunk)
    clean = keras.layers.Dense(64, activation="sigmoid")(trunk)
    return keras.Model(image, {"digit": digit, "clean": clean})


def show(epoch, weights, devices):
    shown = ", ".join(
        f"{name} {weight:.3f}" for name, weight in weights.items()
    )
    print(
        f"epoch {epoch + 1} on {devices} devices: weights {shown}", flush=True
    )


def conclude(weights, devices):
    most = max(LOSSES, key=lambda name: float(weights[name]))
    print(f"{devices} devices shared one set of weights: {most} has the most.")


def compile_and_fit(epochs, devices):
    x, y = noisy_digits()
    size = 64 * devices
    samples = len(x) // size * size  # JAX wants even shares.
    x, y = x[:samples], {name: y[name][:samples] for name in y}
    model, dwa = build_model(), DynamicWeightAverage(list(LOSSES))
    model.compile(optimizer="adam", loss=LOSSES, loss_weights=dwa.loss_weights)
    # `dwa` first: it adds the weights to the logs.
    shown = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: show(
            epoch, {name: logs[f"{name}_weight"] for name in LOSSES}, devices
        )
    )
    model.fit(
        x,
        y,
        batch_size=size,
        epochs=epochs,
        verbose=0,
        callbacks=[dwa, shown],
    )
    conclude(dwa.loss_weights, devices)


def main_jax(epochs):
    devices = keras.distribution.list_devices()
    if len(devices) == 1:
        devices = keras.distribution.list_devices("cpu")
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(devices=devices)
    )
    compile_and_fit(epochs, len(devices))


def main_tensorflow(epochs):
    import tensorflow as tf

    devices = None
    if len(tf.config.list_physical_devices("GPU")) < 2:
        (cpu,) = tf.config.list_physical_devices("CPU")
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        devices = ["CPU:0", "CPU:1"]
    strategy = tf.distribute.MirroredStrategy(devices)
    with strategy.scope():
        compile_and_fit(epochs, strategy.num_replicas_in_sync)


def main_torch(epochs):
    import torch

    devices = max(torch.cuda.device_count(), 2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (devices, f"file://{folder}/ranks", epochs)
        torch.multiprocessing.spawn(train_rank, arguments, nprocs=devices)


def train_rank(rank, ranks, address, epochs):
    """What each of torch's processes runs."""
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler

    is_gpu = torch.cuda.device_count() >= ranks
    if is_gpu:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if is_gpu else "gloo",
        init_method=address,
        rank=rank,
        world_size=ranks,
    )
    keras.utils.set_random_seed(0)
    x, y = noisy_digits()
    samples = [
        (image, {name: y[name][i] for name in y}) for i, image in enumerate(x)
    ]
    sampler = DistributedSampler(samples)
    batches = DataLoader(samples, batch_size=64, sampler=sampler)
    model = DistributedDataParallel(build_model())
    optimizer = torch.optim.Adam(model.parameters())

    dwa = DynamicWeightAverage(list(LOSSES))
    compound = CompoundLoss(LOSSES, dwa)
    for epoch in range(epochs):
        if rank == 0:
            show(
                epoch,
                {
                    name: float(weight)
                    for name, weight in dwa.loss_weights.items()
                },
                ranks,
            )
        sampler.set_epoch(epoch)
        for images, targets in batches:
            loss = compound(targets, model(images, training=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        dwa.step()  # On every rank: the averages are those over all of them.
    if rank == 0:
        conclude(dwa.loss_weights, ranks)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    keras.utils.set_random_seed(0)
    main = {"jax": main_jax, "tensorflow": main_tensorflow, "torch": main_torch}
    main[keras.backend.backend()](parser.parse_args().epochs)
