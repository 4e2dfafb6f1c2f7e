"""Ten short epochs of `fit`: weights that move, static ones, and compiling again for each epoch.

    KERAS_BACKEND=jax python benchmarks/recompiling.py

To compile again with new numbers in `loss_weights` is what one does without this package. Each
round trains a model in each way, in turn, in one process; the ratios are taken within a round.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
from harness import interleaved, parse, print_table, ratios, shown
from models import SIZES, build, data, names

OUTPUTS, STEPS = 8, 50


def main():
    arguments = parse(__doc__, rounds=5, epochs=10)
    rounds, epochs = (1, 2) if arguments.quick else (arguments.rounds, arguments.epochs)
    batch = SIZES["small"][2]
    x, y = data(OUTPUTS, STEPS * batch)
    (static, _), (moving, callbacks), (again, _) = (build(OUTPUTS, kind) for kind in (0, 1, 0))

    def fit(model, epochs, callbacks=()):
        model.fit(x, y, batch, epochs, verbose=0, callbacks=list(callbacks))

    def fit_compiling_again():
        for epoch in range(epochs):
            weights = dict.fromkeys(names(OUTPUTS), 1.0 + epoch / epochs)
            model_losses = dict.fromkeys(names(OUTPUTS), "mse")
            again.compile(again.optimizer, model_losses, loss_weights=weights)
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
    ratio_cells = [shown(ratios(taken, *pair)) for pair in compared]
    columns = ["backend", *(f"{name}, s" for name in runs), *map(" / ".join, compared)]
    print_table(columns, [[keras.backend.backend(), *times, *ratio_cells]])


if __name__ == "__main__":
    main()
