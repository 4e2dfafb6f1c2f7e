"""Short runs of the examples."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from common import BACKEND, deep_elsewhere, one_backend
from known_rules import RULES
from processes import succeeds

EXAMPLES = Path(__file__).parent.parent / "examples"


def call(script, arguments, output):
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *arguments]
    with output.open("w") as sys.stdout:
        runpy.run_path(str(script), run_name="__main__")


@pytest.fixture
def run(tmp_path):
    """A function that runs an example as a script, and returns its output by line."""

    def run(name, epochs, *more):
        arguments = ["--epochs", str(epochs), *more]
        assert succeeds(call, EXAMPLES / name, arguments, tmp_path / "output")
        return (tmp_path / "output").read_text().splitlines()

    return run


def numbers(line):
    return [float(number) for number in re.findall(r"\d+\.\d+(?:e[-+]\d+)?", line)]


def check_table(lines):
    """Three epochs, with a loss that falls, and weights that move and sum to 3."""
    rows = [numbers(line) for line in lines if re.match(r" +[123] \|", line)]
    assert len(rows) == 3
    assert rows[2][0] < rows[0][0]
    assert [sum(row[1::2]) for row in rows] == pytest.approx([3] * 3, abs=0.003)
    assert rows[2][1::2] != rows[0][1::2] == [1.0, 1.0, 1.0]


def check_metrics(lines, names):
    """A line for each metric, with its values under both ways to weight the losses."""
    cells = [line.split("|") for line in lines[-len(names) :]]
    assert [task.split(":")[0] for task, *_ in cells] == names
    assert [len(numbers(value)) for _, *values in cells for value in values] == [1, 1] * len(names)


@deep_elsewhere
def test_digits(run):
    lines = run("digits.py", 3)
    assert f"on {BACKEND}: three runs of 3 epochs" in lines[0]
    rows = [numbers(line) for line in lines if re.match(r" +[123] \|", line)]
    assert sum(rows[0][1::2]) == pytest.approx(3, abs=0.003)
    # The largest loss has the smallest weight.
    assert np.argmin(rows[0][1::2]) == np.argmax(rows[0][::2])
    assert rows[0][1::2] == rows[1][1::2] != rows[2][1::2]
    names, *cells = [line.split("|") for line in lines[-5:] if "+-" not in line]
    assert [name.strip() for name in names[1:]] == ["equal weights", "DWA", "DWA after adapt"]
    assert [task.split(":")[0] for task, *_ in cells] == ["digit", "angle", "upright"]
    assert [len(numbers(value)) for _, *values in cells for value in values] == [1] * 9


@pytest.mark.deep
def test_search_weights(run, tmp_path):
    picture = tmp_path / "picture.png"
    lines = run("search_weights.py", 2, "--trials", "4", "--picture", str(picture))
    trials = [line for line in lines if re.match(r" +[1234] \|", line)]
    assert numbers(trials[0])[:3] == [1.0, 1.0, 1.0]
    gains = [float(trial.split("|")[-1].strip(" %")) for trial in trials]
    # Other weights, other metrics; from the same start, none is twice as good.
    assert len(set(gains)) == 4
    assert max(map(abs, gains)) < 50
    best = 1 + int(np.argmax(gains))
    assert any(f"The best is trial {best}" in line for line in lines)
    assert [len(numbers(line)) for line in lines[-3:]] == [3, 3, 3]
    assert picture.read_bytes().startswith(b"\x89PNG")


@deep_elsewhere
def test_custom_loop(run):
    rows = [numbers(line) for line in run(f"custom_loop_{BACKEND}.py", 3)]
    assert [sum(row[1:]) for row in rows] == pytest.approx([3] * 3, abs=0.003)
    assert rows[2][1:] != rows[1][1:] != rows[0][1:] == [1.0, 1.0, 1.0]
    assert rows[2][0] < rows[0][0]


@deep_elsewhere
def test_vae(run):
    rows = [numbers(line) for line in run("vae.py", 4)]
    dwa, annealed = (rows[start : start + 4] for start in (3, 10))
    assert [row[1] + row[3] for row in dwa] == pytest.approx([2] * 4, abs=0.003)
    assert dwa[3][1] != 1.0
    assert dwa[3][4] < dwa[0][4]
    assert [row[3] for row in annealed] == [0.0, 0.0, 0.2, 0.4]
    assert annealed[3][4] < annealed[1][4]


@pytest.mark.deep
@one_backend
def test_known_rules(run):
    lines = run("known_rules.py", 3)
    weights = {line.split(":")[0].strip(): numbers(line) for line in lines if "last epoch" in line}
    assert list(weights) == list(RULES)
    assert len({tuple(each) for each in weights.values()}) == len(RULES)
    assert weights.pop("SoftAdapt") == pytest.approx([1 / 3] * 3, abs=0.05)
    assert weights.pop("LBTW") == pytest.approx([0.8] * 3, abs=0.4)
    for each in weights.values():
        assert sum(each) == pytest.approx(3, abs=0.003)
    assert [len(numbers(line)) for line in lines[-3:]] == [len(RULES)] * 3


@deep_elsewhere
def test_pinn_nears_the_exact_solution(run):
    (error,) = numbers(run("pinn.py", 100)[-1])
    assert error < 0.05


@pytest.mark.deep
@pytest.mark.skipif(BACKEND == "tensorflow", reason="trains as digits does, for half a minute")
def test_dense_prediction(run, tmp_path):
    picture = tmp_path / "picture.png"
    # With attention networks on top. Compiling them takes minutes.
    attention = ["--attention"] if BACKEND == "torch" else []
    lines = run("dense_prediction.py", 3, "--scenes", "20", "--picture", str(picture), *attention)
    check_table(lines)
    check_metrics(lines, ["semantic"] * 2 + ["depth"] * 2 + ["normals"] * 5)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.deep
def test_data_parallel():
    # In a separate process, because torch starts its processes from the script's file.
    script = EXAMPLES / "data_parallel.py"
    output = subprocess.check_output([sys.executable, script, "--epochs", "3"], text=True)
    rows = [numbers(line) for line in output.splitlines() if line.startswith("epoch")]
    assert [sum(row) for row in rows] == pytest.approx([3] * 3, abs=0.003)
    assert rows[2] != rows[1] == [1.0, 1.0, 1.0]
