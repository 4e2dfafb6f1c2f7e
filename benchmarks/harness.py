"""What the benchmarks share: interleaved rounds, ratios with their spread, and tables."""

import argparse
import gc
import itertools
import statistics
import time


def parse(description, **more):
    """The arguments of a script: `--quick`, and others by name and default."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="in seconds, for the tests")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()


def seconds(run, times=1):
    """The seconds per run, over several runs."""
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def interleaved(runs, rounds, times=1, clock=seconds):
    """Name to the seconds of a run in each round. All take turns in every round.

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
    """The ratio of the times of two runs, within each round."""
    return [ours / theirs for ours, theirs in zip(taken[name], taken[base], strict=True)]


def shown(values, digits=2):
    """The median, with the quartiles."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def print_table(columns, rows):
    """Prints a Markdown table, row by row as it is measured."""
    for cells in itertools.chain([columns, ["---"] * len(columns)], rows):
        print("|", " | ".join(map(str, cells)), "|", flush=True)


def instructions(lowered):
    """The operations of an XLA function: fused loops, calls and copies."""
    hlo = lowered.compile().as_text()
    lines = hlo[hlo.index("\nENTRY") :].splitlines()
    free = ("parameter(", "constant(", "bitcast(", "tuple(", "get-tuple-element(")
    return sum(" = " in line and not any(name in line for name in free) for line in lines)
