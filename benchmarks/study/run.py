"""Does it help? The study behind the evidence page: every rule, on eight families of tasks.

    python benchmarks/study/run.py

trains eight families of tasks by every method on ten seeds, and writes the tables and pictures of
the evidence pages in `docs/`. What was trained is in `results/` and is not trained again, so
that the study continues after a kill. Delete a file there to train its family again.

For each family, in this order: the learning rate is chosen for equal weights, by the lowest
`val_base_loss` of any epoch, and used for all; each task is trained alone; static weights are drawn
at random as often as the budget says, and the best of them on validation joins the methods; so do
weights that `adapt` scales. For the same seed, all have the same initial weights, and the same
batches, except those that adapt: Keras shuffles the first epoch of a built model otherwise.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples"))
os.environ.setdefault("KERAS_BACKEND", "jax")
# What was compiled for one run, for all.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/keras_dwa_study")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import keras
import numpy as np
from families import FAMILIES
from methods import BUDGET, METHODS, drawn
from report import write
from results import Results
from training import train

FOLDER = Path(__file__).parent
DOCS = FOLDER.parents[1] / "docs"
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = tuple(range(10))
# Choices are made on other seeds.
OTHER_SEEDS = (100, 101)
# What is trained on the other backends, too.
OTHER_BACKENDS = ("tensorflow", "torch")
SUBSET, SUBSET_METHODS, SUBSET_SEEDS = "digits", ("equal", "DWA, T = 0.5", "random"), SEEDS[:5]


def start_worker(cores):
    os.sched_setaffinity(0, {cores.get()})


def trained(job):
    return train(**job)


class Study:
    """All runs of a family, of which those are trained that are not done.

    Args:
        results: what is done.
        run_all: from jobs to their rows, in any order.
        epochs: of a run; None for as many as the family has.
    """

    def __init__(self, results, name, run_all, epochs=None):
        self.results, self.name, self.run_all, self.epochs = results, name, run_all, epochs

    def train(self, runs):
        """Trains what is missing of `(method, seed, rate, weights)`."""
        names = ("method", "seed", "rate", "weights")
        jobs = [
            {"name": self.name, "epochs": self.epochs, **dict(zip(names, run, strict=True))}
            for run in runs
            if run[:2] not in self.results.runs
        ]
        for number, rows in enumerate(self.run_all(jobs), 1):
            self.results.add(rows)
            of = f"{number} of {len(jobs)}"
            print(time.strftime("%H:%M:%S"), self.name, rows[0]["method"], of, flush=True)

    def complete(self, rates, seeds, methods, budget):
        """Trains all that is missing of a family, one choice after the other."""
        results, tasks = self.results, self.results.family.tasks
        self.train([(f"rate {rate:g}", s, rate, None) for rate in rates for s in OTHER_SEEDS])
        losses = [
            results.column(f"rate {rate:g}", "val_base_loss").min(axis=1).mean() for rate in rates
        ]
        rate = rates[int(np.argmin(losses))]
        alone = [
            (method, seed, rate, None) for method in results.family.references for seed in seeds
        ]
        self.train(alone)
        runs = [(method, seed, rate, None) for method in methods for seed in seeds]
        for tuned, of in {"static, tuned": "drawn", "adapt, tuned": "drawn from adapt"}.items():
            draws = {f"{of} {n}": drawn(tasks, n) for n in range(budget)}
            self.train([(name, OTHER_SEEDS[0], rate, weights) for name, weights in draws.items()])
            best = max(draws, key=lambda name: results.gains(name, "val").max())
            runs += [(tuned, seed, rate, draws[best]) for seed in seeds]
        self.train(runs)


def on_backends(rate):
    """The subset on the other backends, side by side: backend to results."""
    command = [sys.executable, __file__, "--subset", str(rate)]
    started = [
        subprocess.Popen(command, env={**os.environ, "KERAS_BACKEND": backend})
        for backend in OTHER_BACKENDS
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError(f"A backend failed: {dict(zip(OTHER_BACKENDS, codes, strict=True))}.")
    return {backend: Results(FOLDER / "results" / backend, SUBSET) for backend in OTHER_BACKENDS}


def subset(rate):
    """Trains the subset on this backend."""
    results = Results(FOLDER / "results" / keras.backend.backend(), SUBSET)
    names = [*results.family.references, *SUBSET_METHODS]
    study = Study(results, SUBSET, lambda jobs: map(trained, jobs))
    study.train([(name, seed, rate, None) for name in names for seed in SUBSET_SEEDS])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subset", type=float, metavar="RATE", help="only that, on this backend")
    parser.add_argument(
        "--quick",
        type=Path,
        metavar="FOLDER",
        help="a small part, in FOLDER: for the tests",
    )
    arguments = parser.parse_args()
    if arguments.subset:
        return subset(arguments.subset)
    if arguments.quick:
        folder = arguments.quick
        all_results = {SUBSET: Results(folder, SUBSET, 2)}
        study = Study(all_results[SUBSET], SUBSET, lambda jobs: map(trained, jobs), 2)
        study.complete(RATES[1:2], SEEDS[:2], ["equal", "DWA, T = 2"], 2)
        return write(all_results, all_results, [folder / "evidence.md"], folder)
    if keras.backend.backend() != "jax":
        parser.error("What was trained so far was so on JAX: leave KERAS_BACKEND alone.")
    all_results = {name: Results(FOLDER / "results", name) for name in FAMILIES}
    context = multiprocessing.get_context("spawn")
    cores = context.SimpleQueue()
    for core in os.sched_getaffinity(0):
        cores.put(core)
    with context.Pool(len(os.sched_getaffinity(0)), start_worker, (cores,)) as pool:
        for name, results in all_results.items():
            methods = [m for m in METHODS if m != "annealed KL" or "kl" in FAMILIES[name].tasks]
            study = Study(results, name, lambda jobs: pool.imap_unordered(trained, jobs))
            study.complete(RATES, SEEDS, methods, BUDGET)
    whole = all_results[SUBSET]
    (first, *_) = whole.runs["equal", SEEDS[0]]
    backends = {"jax": whole.subset(SUBSET_SEEDS), **on_backends(first["rate"])}
    pages = [DOCS / "evidence.md", DOCS / "evidence_details.md"]
    write(all_results, backends, pages, DOCS / "pictures")


if __name__ == "__main__":
    main()
