"""What the study found so far: a file for each family, and what it comes to."""

import copy
import csv
import io
from pathlib import Path

import numpy as np
from families import FAMILIES
from scipy import stats
from training import columns


class Results:
    """The runs of a family that were done, in a CSV file with a row for each epoch of each.

    Args:
        folder: where the file is, or will be.
        name: that of the family.
        epochs: how many a run has. One that has fewer was killed, and is left out.
    """

    def __init__(self, folder, name, epochs=None):
        self.family, self.path = FAMILIES[name], Path(folder) / f"{name}.csv"
        self.runs, epochs = {}, epochs or self.family.epochs
        found = {}
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            for row in csv.DictReader(line for line in lines if line.endswith("\n")):
                found.setdefault((row["method"], row["seed"]), []).append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_suffix(".part")
        with whole.open("w", newline="") as file:
            self._writer(file).writeheader()
        for rows in found.values():
            if len(rows) == epochs:
                self.add(rows, whole)
        whole.replace(self.path)

    def add(self, rows, path=None):
        """Adds a run and writes it to the file."""
        written = io.StringIO(newline="")
        rows = [{key: _shown(value) for key, value in row.items()} for row in rows]
        self._writer(written).writerows(rows)
        with (path or self.path).open("a", newline="") as file:
            file.write(written.getvalue())
        self.runs[rows[0]["method"], int(rows[0]["seed"])] = rows

    def subset(self, seeds):
        """The results of some of the seeds alone."""
        found = copy.copy(self)
        found.runs = {run: rows for run, rows in self.runs.items() if run[1] in seeds}
        return found

    def column(self, method, name):
        """Its values in all runs of a method, in the order of their seeds: shape `(S, epochs)`."""
        runs = sorted((seed, rows) for (found, seed), rows in self.runs.items() if found == method)
        return np.array([[float(row[name]) for row in rows] for _, rows in runs])

    def references(self, part):
        """Metric to what those that it is compared with reach, as the mean over the seeds.

        Each is of the epoch that is best by the metric itself on validation.
        """
        found = {}
        for metric, (method, _) in zip(
            self.family.judged, self.family.references.items(), strict=True
        ):
            best = self._sign(metric) * self.column(method, f"{metric}: val")
            values = self.column(method, f"{metric}: {part}")
            found[metric] = values[np.arange(len(values)), best.argmax(axis=1)].mean()
        return found

    def gains(self, method, part):
        """By how many percent a method is better, as the mean of all metrics: `(S, epochs)`."""
        return (
            np.mean(
                [
                    self._sign(metric) * (self.column(method, f"{metric}: {part}") / reference - 1)
                    for metric, reference in self.references(part).items()
                ],
                axis=0,
            )
            * 100
        )

    def ranks(self, methods, part):
        """Method to its rank among these, from 1, as the mean over the seeds and all metrics."""
        values = [
            [
                self._sign(metric) * self.at_best(name, self.column(name, f"{metric}: {part}"))
                for metric in self.family.judged
            ]
            for name in methods
        ]
        ranks = stats.rankdata(-np.array(values), axis=0)
        return dict(zip(methods, ranks.mean(axis=(1, 2)), strict=True))

    def best(self, method):
        """The epoch, from 0, of each run's best gain on validation: shape `(S,)`."""
        return self.gains(method, "val").argmax(axis=1)

    def at_best(self, method, values):
        """Of values of shape `(S, epochs)`, those of the best epochs."""
        return values[np.arange(len(values)), self.best(method)]

    def _writer(self, file):
        return csv.DictWriter(file, columns(self.family), lineterminator="\n")

    def _sign(self, metric):
        return 1 if metric in self.family.higher else -1


def _shown(value):
    return f"{value:.5g}" if isinstance(value, float | np.floating) else value
