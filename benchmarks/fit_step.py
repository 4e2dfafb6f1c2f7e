"""The step of `fit` with weights that move, against the same model with static weights.

    KERAS_BACKEND=jax python benchmarks/fit_step.py

Each round trains both for two epochs of many steps, in turn, in one process, and measures the
second epoch, callbacks included. The ratio is taken within a round. The last rows measure ten
epochs of 50 steps, with all that a `fit` does. "twin" is another model with static weights: its
ratio shows how much the machine varies.

The table also has two counts of one step, moving and static, which do not depend on the machine.
Operations: on JAX, what XLA's compiled step calls (loops, calls and copies); on TensorFlow, the
nodes of the graph except constants, before XLA compiles it; on torch, the calls that its profiler
sees in an eager step. Python calls: all calls of functions, in Python or from it, in all that `fit`
does.
"""

import collections
import os
import sys
import threading
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
from harness import instructions, interleaved, parse, print_table, ratios, seconds, shown
from models import SIZES, build, data

BACKEND = keras.backend.backend()
MODES = {
    "compiled": {"jit_compile": True} if BACKEND == "torch" else {},
    "eager": {"run_eagerly": True},
}


def operations(model, x, y):
    """The number of operations in a step."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        step = tf.function(model.train_step).get_concrete_function((x, y))
        return sum(op.type != "Const" for op in step.graph.get_operations())
    if BACKEND == "torch":
        from torch.profiler import profile

        model.train_on_batch(x, y)
        with profile() as profiled:
            model.train_on_batch(x, y)
        return len(profiled.events())
    import jax

    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([variable.value for variable in group] for group in groups)
    step = jax.jit(model.train_step, donate_argnums=0)  # As Keras does.
    return instructions(step.lower(state, (x, y)))


class Watch(keras.callbacks.Callback):
    """Measures the time from the end of an epoch to the end of the next, callbacks included."""

    end = 0.0

    def on_epoch_end(self, epoch, logs=None):
        start, self.end = self.end, time.perf_counter()
        self.seconds = self.end - start


def python_calls(fit):
    """The number of Python calls in a step: the difference of fits with 60 and 30 steps."""
    counted = []
    for steps in (30, 60):
        run, events = fit(steps), collections.Counter()
        run()

        def note(frame, event, arg, events=events):
            events[event] += 1

        threading.setprofile(note)  # For the thread in which Keras calls callbacks on JAX.
        sys.setprofile(note)
        run()
        sys.setprofile(None)
        threading.setprofile(None)
        counted.append(events["call"] + events["c_call"])
    return round((counted[1] - counted[0]) / 30)


def row(size, mode, outputs, rounds, duration, epochs=None, steps=None):
    """The cells of a row, from that many epochs, or from one that takes `duration` seconds."""
    if BACKEND == "torch":
        import torch

        # Otherwise it stops compiling a function after 8 times.
        torch._dynamo.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    batch, watch = SIZES[size][2], Watch()
    if mode == "eager" and BACKEND != "torch":
        rounds = min(rounds, 5)  # If steps are long.
    kinds = {"static": False, "twin": False, "moving": True}
    models = {name: build(outputs, kind, size, **MODES[mode]) for name, kind in kinds.items()}

    def fit(name, steps, epochs):
        (model, callbacks), (x, y) = models[name], data(outputs, steps * batch)
        callbacks = [*callbacks, watch]
        return lambda *_: model.fit(x, y, batch, epochs, verbose=0, callbacks=callbacks)

    def second_epoch(run, times):
        run()
        return watch.seconds

    if steps is None:
        fit("static", 3, 1)()
        fit("static", 10, 2)()
        steps = max(3, round(duration / watch.seconds * 10))
    runs = {name: fit(name, steps, epochs or 2) for name in models}
    for run in runs.values():
        run()
    taken = interleaved(runs, rounds, clock=seconds if epochs else second_epoch)
    each = 1e3 * sorted(taken["static"])[rounds // 2] / steps / (epochs or 1)
    counted = calls = "-"
    if mode == ("eager" if BACKEND == "torch" else "compiled"):
        ours, theirs = (
            operations(models[name][0], *data(outputs, batch)) for name in ("moving", "static")
        )
        counted = f"{ours} / {theirs}"
        ours, theirs = (
            python_calls(lambda steps, name=name: fit(name, steps, 1))
            for name in ("moving", "static")
        )
        calls = f"{ours} / {theirs}"
    trained = f"{size}, {epochs} epochs of {steps}" if epochs else size
    compared = [shown(ratios(taken, name, "static")) for name in ("moving", "twin")]
    return BACKEND, mode, trained, outputs, f"{each:.2f}", *compared, counted, calls


def rows(rounds, duration, is_quick):
    own = "eager" if BACKEND == "torch" else "compiled"
    all_outputs, sizes, modes = (2, 8, 32), list(SIZES), list(MODES)
    short = {"epochs": 10, "steps": 50}
    if is_quick:
        # On torch, compiling takes most of a minute.
        rounds, duration, all_outputs, sizes, modes = 2, 0.01, (2,), ["small"], [own]
        short = {"epochs": 2, "steps": 2}
    for mode in modes:
        for size in sizes:
            # On torch, compiling these takes many minutes.
            if (BACKEND, mode, size) != ("torch", "compiled", "medium"):
                for outputs in all_outputs:
                    yield row(size, mode, outputs, rounds, duration)
    rounds = min(rounds, 5 if own == "eager" else 11)
    for outputs in all_outputs:
        yield row("small", own, outputs, rounds, duration, **short)


def main():
    arguments = parse(__doc__, rounds=21, seconds=0.1)
    columns = ["backend", "mode", "model", "K", "ms a step", "moving / static"]
    columns += ["twin / static", "operations", "Python calls"]
    print_table(columns, rows(arguments.rounds, arguments.seconds, arguments.quick))


if __name__ == "__main__":
    main()
