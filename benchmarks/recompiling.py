"""Ten short epochs of `fit`: weights that move, static ones, and compiling again for each epoch.

    KERAS_BACKEND=jax python benchmarks/recompiling.py

Without this package, one has to compile again with new numbers in `loss_weights`. Each round trains
a model in each way, in turn, in one process. The ratios are taken within a round.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
from harness import interleaved, parse, print_table, ratios, shown
from models import SIZES, build, data, names

OUTPUTS = 8


def row(steps, rounds, epochs):
    batch = SIZES["small"][2]
    x, y = data(OUTPUTS, steps * batch)
    (static, _), (moving, callbacks), (again, _) = (build(OUTPUTS, kind) for kind in (0, 1, 0))

    def fit(model, epochs, callbacks=()):
        model.fit(x, y, batch, epochs, verbose=0, callbacks=list(callbacks))

    def fit_compiling_again():
        for epoch in range(epochs):
            weights = dict.fromkeys(names(OUTPUTS), 1.0 + epoch / epochs)
            losses = dict.fromkeys(names(OUTPUTS), "mse")
            again.compile(again.optimizer, losses, loss_weights=weights)
            fit(again, 1)

    runs = {
        "static": lambda: fit(static, epochs),
        "moving": lambda: fit(moving, epochs, callbacks),
        "compiled again": fit_compiling_again,
    }
    for name in ("static", "moving"):
        runs[name]()
    taken = interleaved(runs, rounds)
    times = [f"{sorted(taken[name])[rounds // 2]:.2f}" for name in runs]
    compared = [("moving", "static"), ("compiled again", "static"), ("compiled again", "moving")]
    return keras.backend.backend(), steps, *times, *(shown(ratios(taken, *two)) for two in compared)


def main():
    is_quick = parse(__doc__).quick
    rounds, epochs, all_steps = (1, 2, (5,)) if is_quick else (5, 10, (10, 50))
    columns = ["backend", "steps", "static, s", "moving, s", "compiled again, s"]
    columns += ["moving / static", "compiled again / static", "compiled again / moving"]
    print_table(columns, [row(steps, rounds, epochs) for steps in all_steps])


if __name__ == "__main__":
    main()
