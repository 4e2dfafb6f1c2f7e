"""The step of `fit` with weights that move, against the same model with static weights.

    KERAS_BACKEND=jax python benchmarks/fit_step.py

Each round trains both for an epoch of many steps, in turn, in one process; the ratio is taken
within a round. In the last rows that is ten epochs of 50 steps, where the epochs' ends count, too.
Beside it stand the operations of one step, ours and static, which do not depend on the machine: on
JAX those that XLA's compiled step calls, each a loop, a call or a copy; on TensorFlow the nodes of
the graph; on torch the calls that its profiler sees in an eager step.
"""

import os

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
    """How many operations a step has."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        step = tf.function(model.train_step).get_concrete_function((x, y))
        return len(step.graph.get_operations())
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
    return instructions(jax.jit(model.train_step).lower(state, (x, y)))


def row(size, mode, outputs, rounds, duration, epochs=1, steps=None):
    """The cells of a table's row; without `steps`, as many as take `duration` seconds."""
    batch = SIZES[size][2]
    if mode == "eager" and BACKEND != "torch":
        rounds = min(rounds, 5)  # Of long steps.
    static, moving = (build(outputs, moving, size, **MODES[mode]) for moving in (False, True))

    def fit(model, callbacks, steps):
        x, y = data(outputs, steps * batch)
        arguments = {"batch_size": batch, "epochs": epochs, "verbose": 0, "callbacks": callbacks}
        return lambda: model.fit(x, y, **arguments)

    fit(*static, 3)()
    fit(*moving, 3)()
    if steps is None:
        steps = max(3, round(duration / seconds(fit(*static, 10)) * 10))
    runs = {"static": fit(*static, steps), "moving": fit(*moving, steps)}
    for run in runs.values():
        run()
    taken = interleaved(runs, rounds)
    each = 1e3 * sorted(taken["static"])[rounds // 2] / steps / epochs
    counted = "-"
    if mode == ("eager" if BACKEND == "torch" else "compiled"):
        ours, theirs = (operations(model, *data(outputs, batch)) for model, _ in (moving, static))
        counted = f"{ours} / {theirs}"
    trained = f"{size}, {epochs} epochs of {steps}" if epochs > 1 else size
    ratio = shown(ratios(taken, "moving", "static"))
    return BACKEND, mode, trained, outputs, f"{each:.2f}", ratio, counted


def main():
    arguments = parse(__doc__, rounds=15, seconds=0.2)
    rounds, duration = arguments.rounds, arguments.seconds
    all_outputs, sizes, modes = (2, 8, 32), list(SIZES), list(MODES)
    if arguments.quick:
        rounds, duration, all_outputs, sizes = 2, 0.01, (2,), ["small"]
        # To compile takes torch most of a minute.
        modes = ["eager" if BACKEND == "torch" else "compiled"]
    rows = [
        row(size, mode, outputs, rounds, duration)
        for mode in modes
        for size in sizes
        for outputs in all_outputs
        # To compile these takes torch many minutes.
        if (BACKEND, mode, size) != ("torch", "compiled", "medium")
    ]
    short = {"epochs": 2, "steps": 2} if arguments.quick else {"epochs": 10, "steps": 50}
    mode, rounds = "eager" if BACKEND == "torch" else "compiled", min(rounds, 9)
    rows += [row("small", mode, outputs, rounds, duration, **short) for outputs in all_outputs]
    columns = ["backend", "mode", "model", "K", "ms a step", "moving / static", "operations"]
    print_table(columns, rows)


if __name__ == "__main__":
    main()
