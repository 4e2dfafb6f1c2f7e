"""The three tasks of `digits.py` on all devices there are, or on two simulated ones.

    python examples/data_parallel.py

On JAX and TensorFlow, `fit` trains under `keras.distribution` and `tf.distribute`. On torch, each
device has a process of its own, with a loop under `DistributedDataParallel`. Each device has its
share of every batch. The weights follow the losses of the whole, and are the same everywhere. The
backend is the one that KERAS_BACKEND names: tensorflow, jax (if it is unset) or torch.
"""

import argparse
import os
import tempfile

# For JAX on a CPU; it reads this before it starts.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import keras
from digits import TASKS, build_model, rotated_digits

from keras_dwa import CompoundLoss, DynamicWeightAverage


def show(epoch, weights, devices):
    shown = ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items())
    print(f"epoch {epoch + 1} on {devices} devices: weights {shown}", flush=True)


def compile_and_fit(epochs, devices):
    x, y = rotated_digits()
    size = 64 * devices
    samples = len(x) // size * size  # JAX wants even shares.
    x, y = x[:samples], {name: y[name][:samples] for name in y}
    model, dwa = build_model(), DynamicWeightAverage(list(TASKS))
    model.compile(optimizer="adam", loss=TASKS, loss_weights=dwa.loss_weights)
    history = model.fit(x, y, batch_size=size, epochs=epochs, verbose=0, callbacks=[dwa]).history
    for epoch in range(epochs):
        show(epoch, {name: history[f"{name}_weight"][epoch] for name in TASKS}, devices)


def main_jax(epochs):
    devices = keras.distribution.list_devices()
    if len(devices) == 1:
        devices = keras.distribution.list_devices("cpu")
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
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
        "nccl" if is_gpu else "gloo", init_method=address, rank=rank, world_size=ranks
    )
    keras.utils.set_random_seed(0)
    x, y = rotated_digits()
    samples = [(image, {name: y[name][i] for name in y}) for i, image in enumerate(x)]
    sampler = DistributedSampler(samples)
    batches = DataLoader(samples, batch_size=64, sampler=sampler)
    model = DistributedDataParallel(build_model())
    optimizer = torch.optim.Adam(model.parameters())

    dwa = DynamicWeightAverage(list(TASKS))
    compound = CompoundLoss(TASKS, dwa)
    for epoch in range(epochs):
        if rank == 0:
            show(epoch, {name: float(weight) for name, weight in dwa.loss_weights.items()}, ranks)
        sampler.set_epoch(epoch)
        for images, targets in batches:
            loss = compound(targets, model(images, training=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        dwa.step()  # On every rank: the averages are those over all of them.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    keras.utils.set_random_seed(0)
    main = {"jax": main_jax, "tensorflow": main_tensorflow, "torch": main_torch}
    main[keras.backend.backend()](parser.parse_args().epochs)
