"""What the benchmarks share: interleaved rounds, ratios with their spread, and tables."""

import argparse
import gc
import itertools
import statistics
import time


def parse(description, **more):
    """The arguments of a script: `--quick`, and more, name to default."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="in seconds, for the tests")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()


def seconds(run, times=1):
    """How long one of several runs takes."""
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def interleaved(runs, rounds, times=1, clock=seconds):
    """Name to the seconds that a run took in each round, in which each has its turn.

    Every second round goes backwards, so that no run always has the same one before it. `clock`
    is what runs it some times, and returns the seconds of one.
    """
    taken = {name: [] for name in runs}
    for number in range(rounds):
        gc.collect()
        for name in list(runs)[:: 1 if number % 2 else -1]:
            taken[name].append(clock(runs[name], times))
    return taken


def ratios(taken, name, base):
    """The time of one run over that of another, within each round."""
    return [ours / theirs for ours, theirs in zip(taken[name], taken[base], strict=True)]


def shown(values, digits=2):
    """The median, with the quartiles."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def print_table(columns, rows):
    """A table in Markdown, row by row as they are measured."""
    for cells in itertools.chain([columns, ["---"] * len(columns)], rows):
        print("|", " | ".join(map(str, cells)), "|", flush=True)


def instructions(lowered):
    """How many operations XLA's compiled function calls, each a fused loop, a call or a copy."""
    hlo = lowered.compile().as_text()
    lines = hlo[hlo.index("\nENTRY") :].splitlines()
    free = ("parameter(", "constant(", "bitcast(", "tuple(", "get-tuple-element(")
    return sum(" = " in line and not any(name in line for name in free) for line in lines)
