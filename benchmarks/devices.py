"""The training step on 1, 2 and 4 devices: DWA against static weights on the same devices.

    KERAS_BACKEND=jax python benchmarks/devices.py

The devices are parts of one CPU, so the times show what the weights add, not what devices save. JAX
trains with `fit` under `keras.distribution.DataParallel`; TensorFlow with `fit` under
`MirroredStrategy` (with `ReductionToOneDevice`, because TensorFlow's default keeps to groups of one
size in a process); torch with a loop, in a process for each device, under
`DistributedDataParallel`, with a `CompoundLoss` and `step` at the end of an epoch. The number of
samples per device does not depend on the number of devices.

Both ways train epochs in turn, in the same process. The time is the ratio within a round (median
and quartiles), and includes the end of the epoch. TensorFlow is an exception: under a strategy,
each `fit` takes seconds before its first step, so the steps that `fit` made are timed without
callbacks.

Collectives are operations between devices: on JAX, those in the compiled step's HLO; on torch,
those that its profiler sees in one step, and in `DynamicWeightAverage.step`. Numbers of devices
that the process lacks have no row. `--quick` measures 2 devices only.
"""

import functools
import os
import re
import tempfile

os.environ.setdefault("KERAS_BACKEND", "jax")
# JAX reads it when it starts.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import keras
import numpy as np
from harness import interleaved, parse, print_table, ratios, shown

from keras_dwa import CompoundLoss, DynamicWeightAverage

NAMES = [f"task_{k}" for k in range(4)]
LOSSES = dict.fromkeys(NAMES, "mse")
STATIC = dict.fromkeys(NAMES, 1.0)
SAMPLES, WIDTH = 32, 256  # Samples per device in a batch; width of the layer that the tasks share.


def data(samples):
    x = np.random.default_rng(0).normal(size=(samples, 32)).astype("float32")
    return x, {name: x[:, [k]] for k, name in enumerate(NAMES)}


def build():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((32,))
    features = keras.layers.Dense(WIDTH, activation="relu")(inputs)
    return keras.Model(inputs, {name: keras.layers.Dense(1)(features) for name in NAMES})


def by_fit(devices, batches):
    """Name to model, and name to a function that trains an epoch."""
    models, runs = {}, {}
    x, y = data(SAMPLES * devices * batches)
    for name in ("static", "DWA"):
        dwa = DynamicWeightAverage(NAMES)
        models[name], weights = build(), STATIC if name == "static" else dwa.loss_weights
        models[name].compile(keras.optimizers.SGD(1e-3), LOSSES, loss_weights=weights)

        def run(model=models[name], callbacks=() if name == "static" else (dwa,)):
            model.fit(x, y, SAMPLES * devices, verbose=0, callbacks=list(callbacks))

        run()
        runs[name] = run
    return models, runs


def on_jax(devices, batches, rounds):
    import jax

    def collectives(model):
        x, y = data(SAMPLES * devices)
        layout = parallel.get_data_layout(x.shape).backend_layout
        groups = (model.trainable_variables, model.non_trainable_variables)
        groups = (*groups, model.optimizer.variables, model.metrics_variables)
        state = tuple([variable.value for variable in group] for group in groups)
        step = jax.jit(model.train_step).lower(state, jax.device_put((x, y), layout))
        named = r" (?:all-(?:reduce|gather|to-all)|reduce-scatter|collective-\w+)(?:-start)?\("
        return len(re.findall(named, step.compile().as_text()))

    of_process = keras.distribution.list_devices("cpu")
    if devices > len(of_process):
        return None
    parallel = keras.distribution.DataParallel(
        devices=of_process[:devices], auto_shard_dataset=False
    )
    with parallel.scope():  # Without it, there is no distribution again.
        models, runs = by_fit(devices, batches)
        taken = interleaved(runs, rounds)
        return taken, collectives(models["static"]), collectives(models["DWA"]), "-"


def on_tensorflow(devices, batches, rounds):
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    if tf.config.get_logical_device_configuration(cpu) is None:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 4
        )
    if devices > len(tf.config.list_logical_devices("CPU")):
        return None
    names, across = [f"CPU:{k}" for k in range(devices)], tf.distribute.ReductionToOneDevice()
    strategy = tf.distribute.MirroredStrategy(names, across)
    with strategy.scope():
        models, _ = by_fit(devices, batches)
    dataset = tf.data.Dataset.from_tensor_slices(data(SAMPLES * devices))
    dataset = dataset.batch(SAMPLES * devices).repeat()
    batch_of = iter(strategy.experimental_distribute_dataset(dataset))

    def steps(model):
        for _ in range(batches):
            logs = model.train_function(batch_of)
        float(logs["loss"])  # Waits for it.

    runs = {name: functools.partial(steps, model) for name, model in models.items()}
    for run in runs.values():
        run()
    return interleaved(runs, rounds), "-", "-", "-"


def on_torch(devices, batches, rounds):
    import torch

    with tempfile.TemporaryDirectory() as folder:
        returned = torch.multiprocessing.get_context("spawn").SimpleQueue()
        arguments = (devices, f"file://{folder}/ranks", batches, rounds, returned)
        torch.multiprocessing.spawn(train_rank, arguments, nprocs=devices)
        return returned.get()


def train_rank(rank, ranks, address, batches, rounds, returned):
    """Runs in each torch process; the first one returns what it measured."""
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    x, y = data(SAMPLES)
    x, y = torch.from_numpy(x), {name: torch.from_numpy(target) for name, target in y.items()}
    mse, dwa = keras.losses.MeanSquaredError(), DynamicWeightAverage(NAMES)

    def static(y, y_pred):
        return sum(STATIC[name] * mse(y[name], y_pred[name]) for name in NAMES)

    def stepper(loss_function):
        parallel = torch.nn.parallel.DistributedDataParallel(build())
        optimizer = torch.optim.SGD(parallel.parameters(), 1e-3)

        def step():
            loss = loss_function(y, parallel(x, training=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    def epoch(step, end=lambda: None):
        for _ in range(batches):
            step()
        end()

    def collectives(function):
        with torch.profiler.profile() as profile:
            function()
        return sum(event.name.startswith("gloo:") for event in profile.events())

    steps = {"static": stepper(static), "DWA": stepper(CompoundLoss(LOSSES, dwa))}
    runs = {"static": lambda: epoch(steps["static"]), "DWA": lambda: epoch(steps["DWA"], dwa.step)}
    for run in runs.values():
        run()
    taken = interleaved(runs, rounds)
    counted = [collectives(function) for function in (*steps.values(), dwa.step)]
    if rank == 0:
        returned.put((taken, *counted))
    torch.distributed.destroy_process_group()


def main():
    is_quick = parse(__doc__).quick
    batches, rounds = (2, 2) if is_quick else (20, 21)
    backend = keras.backend.backend()
    measure = {"jax": on_jax, "tensorflow": on_tensorflow, "torch": on_torch}[backend]
    rows = []
    for devices in (2,) if is_quick else (1, 2, 4):
        if measured := measure(devices, batches, rounds):
            taken, *collectives = measured
            milliseconds = shown([1e3 * taken / batches for taken in taken["static"]])
            ratio = shown(ratios(taken, "DWA", "static"))
            rows.append((backend, devices, milliseconds, ratio, *collectives))
    of = "collectives of a step"
    columns = ["backend", "devices", "static, ms a step", "DWA / static", f"{of}, static"]
    print_table([*columns, f"{of}, DWA", "of an epoch's end, DWA"], rows)


if __name__ == "__main__":
    main()
