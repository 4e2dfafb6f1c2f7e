"""`CompoundLoss.combine` in custom loops, against what people would write or use instead.

    KERAS_BACKEND=torch python benchmarks/combine.py

On torch, in eager mode, the alternatives are the DWA of TorchJD and of LibMTL, if installed: first
for K scalars that are leaves, then for one tensor of them, then in the step of a model. On JAX
under `jit` and on TensorFlow under `tf.function`, the alternative is the sum of the terms times
constants, in the step of a model. Ours and TorchJD record the terms. The constants do not, and in
LibMTL the trainer does. In each round, all take turns in one process.

The table also counts operations: on torch, the calls that its profiler sees (on a GPU, only
launches of kernels and copies); on JAX, what XLA's compiled step calls; on TensorFlow, the nodes of
the graph except constants.
"""

import importlib
import importlib.util
import os
import sys
import types
from functools import partial

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from harness import instructions, interleaved, parse, print_table, ratios, seconds, shown
from models import names

from keras_dwa import CompoundLoss, DynamicWeightAverage

BACKEND = keras.backend.backend()
SAMPLES, WIDTH = 32, 64


def new_compound(outputs):
    """A compound loss with unequal weights, as in the third epoch."""
    dwa = DynamicWeightAverage(names(outputs))
    for epoch in (1, 2):
        dwa.step({name: 1.0 + k / epoch for k, name in enumerate(names(outputs))})
    return CompoundLoss(names(outputs), dwa)


def new_combine(outputs):
    return new_compound(outputs).combine


def device():
    """The device on which Keras puts torch variables."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torchjd(outputs):
    """TorchJD's DWA in its third epoch; None if it is not installed."""
    if not importlib.util.find_spec("torchjd"):
        return None
    import torch
    from torchjd.scalarization import DWA

    dwa = DWA()
    for _ in range(2):
        dwa(torch.rand(outputs, device=device()))
        dwa.step()
    return dwa


def libmtl(outputs):
    """LibMTL's DWA in its third epoch, which calls `backward` itself; None if not installed."""
    if not (found := importlib.util.find_spec("LibMTL")):
        return None
    # Its `__init__` imports torchvision, which the weightings do not need.
    package = sys.modules["LibMTL"] = types.ModuleType("LibMTL")
    package.__spec__, package.__path__ = found, found.submodule_search_locations
    dwa = importlib.import_module("LibMTL.weighting.DWA").DWA()
    dwa.epoch, dwa.task_num, dwa.device = 2, outputs, device()
    dwa.train_loss_buffer = np.random.default_rng(0).uniform(0.5, 2, (outputs, 3))
    return partial(dwa.backward, T=2.0)


def torch_rows(outputs, rounds, times):
    import torch

    # For small tensors, more threads only disturb one another.
    torch.set_num_threads(1)
    combine, scalarize, go_back = (make(outputs) for make in (new_combine, torchjd, libmtl))
    trunk = torch.nn.Sequential(torch.nn.Linear(16, WIDTH), torch.nn.ReLU()).to(device())
    heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, 1) for _ in range(outputs)).to(device())
    optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], 1e-3)
    rand = partial(torch.rand, device=device())
    x, y = rand(SAMPLES, 16), rand(SAMPLES, 1)
    leaves = [rand((), requires_grad=True) for _ in range(outputs)]
    vector = rand(outputs, requires_grad=True)
    named = names(outputs)
    # Which ones take K scalars, and which take a tensor.
    of_scalars = {"keras_dwa": lambda losses: combine(dict(zip(named, losses, strict=True)))}
    of_tensor = {"keras_dwa": combine}
    if scalarize:
        of_scalars["TorchJD"] = lambda losses: scalarize(torch.stack(losses))
        of_tensor["TorchJD"] = scalarize

    def backward(loss_of, losses):
        loss_of(losses).backward()

    def step(train):
        optimizer.zero_grad()
        features = trunk(x)
        train([torch.nn.functional.mse_loss(head(features), y) for head in heads])
        optimizer.step()

    trained = {name: partial(backward, loss_of) for name, loss_of in of_scalars.items()}
    trained_tensor = {name: partial(backward, loss_of) for name, loss_of in of_tensor.items()}
    if go_back:
        trained["LibMTL"] = lambda losses: go_back(torch.stack(losses))
        trained_tensor["LibMTL"] = go_back
    for case, functions, argument in (
        ("scalars", of_scalars, leaves),
        ("scalars, backward", trained, leaves),
        ("a tensor", of_tensor, vector),
        ("a tensor, backward", trained_tensor, vector),
        ("a step", {name: partial(step, train) for name, train in trained.items()}, None),
    ):
        runs = {
            name: function if argument is None else partial(function, argument)
            for name, function in functions.items()
        }
        counts = {name: calls(run) for name, run in runs.items()}
        taken = interleaved(runs, rounds, times, clock=to_the_end)
        for other in list(runs)[1:]:
            yield cells(case, outputs, taken, other, counts)


def to_the_end(run, times):
    """The seconds per run over several runs, until a GPU is also done."""
    import torch

    def runs():
        for _ in range(times):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return seconds(runs) / times


def calls(run):
    """The operations that torch's profiler sees: on a GPU, only launches of kernels and copies."""
    import torch

    to_the_end(run, 2)
    with torch.profiler.profile() as profiled:
        to_the_end(run, 1)
    started = [event.name for event in profiled.events()]
    if torch.cuda.is_available():
        started = [name for name in started if name.startswith(("cudaLaunch", "cudaMemcpy"))]
    return len(started)


def compiled_rows(outputs, rounds, times):
    step_of = {"jax": jax_step, "tensorflow": tensorflow_step}[BACKEND]
    runs, counts = {}, {}
    for name in ("keras_dwa", "constants"):
        runs[name], counts[name] = step_of(outputs, name == "keras_dwa")
        runs[name]()
    taken = interleaved(runs, rounds, times)
    yield cells("a step", outputs, taken, "constants", counts)


def cells(case, outputs, taken, other, counts):
    """A row of the table."""
    each = f"{1e6 * np.median(taken['keras_dwa']):.0f}"
    ratio = shown(ratios(taken, "keras_dwa", other))
    return BACKEND, case, outputs, other, each, ratio, f"{counts['keras_dwa']} / {counts[other]}"


def inputs(outputs):
    random = np.random.default_rng(0)
    shapes = (SAMPLES, 16), (SAMPLES, 1), (16, WIDTH), *[(WIDTH, 1)] * outputs
    return [random.normal(size=shape).astype("float32") for shape in shapes]


def jax_step(outputs, is_ours):
    import jax

    compound = new_compound(outputs)
    weights = [float(weight) for weight in compound.loss_weights.values()]
    x, y, *parameters = map(jax.numpy.asarray, inputs(outputs))
    variables = [variable.value for variable in compound.weighting.variables]

    def loss_of(parameters, variables):
        trunk, *heads = parameters
        features = jax.nn.relu(x @ trunk)
        terms = [jax.numpy.mean((features @ head - y) ** 2) for head in heads]
        if is_ours:
            values = dict(zip(names(outputs), terms, strict=True))
            return compound.stateless_combine(variables, values)
        return sum(weight * term for weight, term in zip(weights, terms, strict=True)), variables

    @jax.jit
    def step(parameters, variables):
        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, variables), gradients = gradient_of(parameters, variables)
        parameters = jax.tree.map(lambda p, g: p - 1e-3 * g, parameters, gradients)
        return loss, parameters, variables

    state = [parameters, variables if is_ours else []]

    def run():
        loss, *state[:] = step(*state)
        loss.block_until_ready()

    return run, instructions(step.lower(*state))


def tensorflow_step(outputs, is_ours):
    import tensorflow as tf

    compound = new_compound(outputs)
    weights = [float(weight) for weight in compound.loss_weights.values()]
    x, y, *parameters = inputs(outputs)
    x, y, *parameters = tf.constant(x), tf.constant(y), *map(tf.Variable, parameters)

    @tf.function
    def step():
        trunk, *heads = parameters
        with tf.GradientTape() as tape:
            features = tf.nn.relu(x @ trunk)
            terms = [tf.reduce_mean((features @ head - y) ** 2) for head in heads]
            if is_ours:
                loss = compound.combine(dict(zip(names(outputs), terms, strict=True)))
            else:
                loss = sum(weight * term for weight, term in zip(weights, terms, strict=True))
        for parameter, gradient in zip(parameters, tape.gradient(loss, parameters), strict=True):
            parameter.assign_sub(1e-3 * gradient)
        return loss

    nodes = step.get_concrete_function().graph.get_operations()
    return step, sum(node.type != "Const" for node in nodes)


def main():
    arguments = parse(__doc__, rounds=41, times=50)
    rounds, times, all_outputs = arguments.rounds, arguments.times, (2, 8, 32)
    if arguments.quick:
        rounds, times, all_outputs = 2, 2, (2,)
    elif BACKEND == "jax":
        all_outputs = (2, 8, 9, 32)  # Between 8 and 9, a step with constants also slows down.
    rows_of = torch_rows if BACKEND == "torch" else compiled_rows
    rows = [row for outputs in all_outputs for row in rows_of(outputs, rounds, times)]
    columns = ["backend", "what", "K", "against", "µs", "keras_dwa / other", "operations"]
    print_table(columns, rows)


if __name__ == "__main__":
    main()
