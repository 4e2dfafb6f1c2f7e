"""Short runs of the examples."""

import os
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
    os.chdir(output.parent)  # Where the pictures go.
    sys.argv = [str(script), *arguments]
    with output.open("w") as sys.stdout:
        runpy.run_path(str(script), run_name="__main__")


@pytest.fixture
def run(tmp_path):
    """A function that runs an example, and returns its output by line; checks its picture."""

    def run(name, epochs, *more, picture=True):
        arguments = ["--epochs", str(epochs), *more]
        assert succeeds(call, EXAMPLES / f"{name}.py", arguments, tmp_path / "output")
        if picture:
            assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        return (tmp_path / "output").read_text().splitlines()

    return run


def numbers(line):
    return [float(number) for number in re.findall(r"\d+\.\d+(?:e[-+]\d+)?", line)]


def cells(line):
    return [cell.strip() for cell in line.split("|")]


@one_backend
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_can_be_copied_alone(path):
    modules = set(re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
    assert "keras" in modules
    assert not modules & {other.stem for other in EXAMPLES.glob("*.py")}


@deep_elsewhere
def test_digits(run):
    lines = run("digits", 3)
    assert f"on {BACKEND}: three runs of 3 epochs" in lines[0]
    rows = [numbers(line) for line in lines if re.match(r" +[123] \|", line)]
    assert sum(rows[0][1::2]) == pytest.approx(3, abs=0.003)
    # The largest loss has the smallest weight.
    assert np.argmin(rows[0][1::2]) == np.argmax(rows[0][::2])
    assert rows[0][1::2] == rows[1][1::2] != rows[2][1::2]
    table = [cells(line) for line in lines if re.match(r"\w+: .*\|", line)]
    metrics = np.array([row[1:] for row in table], dtype=float)
    metrics[0] *= -1  # The first is an accuracy, the others are errors.
    adapt, dwa = (metrics[:, 1:] < metrics[:, :1]).sum(axis=0)
    assert f"adapt in {adapt} of 3 tasks, DWA after adapt in {dwa} of 3" in lines[-1]


@pytest.mark.deep
@one_backend
def test_search_weights(run):
    lines = run("search_weights", 2, "--trials", "4")
    trials = [line for line in lines if re.match(r" +[1234] \|", line)]
    assert numbers(trials[0])[:3] == [1.0, 1.0, 1.0]
    gains = [float(trial.split("|")[-1].strip(" %")) for trial in trials]
    assert any(f"The best is trial {1 + np.argmax(gains)}" in line for line in lines)


@deep_elsewhere
def test_custom_loop(run):
    *lines, last = run(f"custom_loop_{BACKEND}", 3, picture=False)
    rows = [numbers(line) for line in lines]
    assert [sum(row[1:]) for row in rows] == pytest.approx([2] * 3, abs=0.002)
    assert rows[2][1:] != rows[1][1:] != rows[0][1:] == [1.0, 1.0]
    # Ten classes: what is returned to the model was trained.
    assert int(last.split("%")[0]) > 30


@deep_elsewhere
def test_vae(run):
    lines = run("vae", 3)
    rows = {line.split("|")[0].strip(): numbers(line.split("|", 1)[1]) for line in lines[-5:-2]}
    for reconstruction, kl, bound in rows.values():
        assert reconstruction + kl == pytest.approx(bound, abs=0.002)
    # The KL divergence has had no weight so far but a fifth, in the last epoch.
    assert rows["annealed"][1] > rows["weight 0.25"][1] > rows["weight 1"][1]
    assert f"that of {min(rows, key=lambda name: rows[name][2])}, " in lines[-1]


@pytest.mark.deep
@one_backend
def test_known_rules(run):
    lines = run("known_rules", 3, picture=False)
    weights = {cells(line)[0]: numbers(line)[:3] for line in lines[3:-1]}
    assert list(weights) == list(RULES)
    assert len({tuple(each) for each in weights.values()}) == len(RULES)
    assert weights.pop("SoftAdapt") == pytest.approx([1 / 3] * 3, abs=0.05)
    assert weights.pop("LBTW") == pytest.approx([0.8] * 3, abs=0.4)
    for each in weights.values():
        assert sum(each) == pytest.approx(3, abs=0.003)


@deep_elsewhere
def test_pinn(run):
    lines = run("pinn", 8)
    equal, adapted = (numbers(line) for line in lines[-4:-2])
    # Equal weights forget the start. (The network is the solution only after more epochs.)
    assert adapted[3] < 0.5 * equal[3]
    assert adapted[4] < equal[4]
    assert numbers(lines[-1]) == pytest.approx([equal[4] / adapted[4]], rel=0.1)


@pytest.mark.deep
@pytest.mark.skipif(BACKEND == "tensorflow", reason="trains as digits does, for half a minute")
def test_dense_prediction(run):
    # The attention networks are on top of all else. To compile them takes minutes.
    attention = ["--attention"] if BACKEND == "torch" else []
    lines = run("dense_prediction", 3, "--scenes", "20", *attention)
    dwa = [numbers(line) for line in lines if "epoch " in line][3:]
    assert [sum(row[1::2]) for row in dwa] == pytest.approx([3] * 3, abs=0.003)
    assert dwa[2][1::2] != dwa[1][1::2]
    assert "of 9 metrics" in lines[-1]


@pytest.mark.deep
def test_data_parallel():
    # In a separate process, because torch starts its processes from the script's file.
    script = EXAMPLES / "data_parallel.py"
    output = subprocess.check_output([sys.executable, script, "--epochs", "3"], text=True)
    rows = [numbers(line) for line in output.splitlines() if line.startswith("epoch")]
    assert [sum(row) for row in rows] == pytest.approx([2] * 3, abs=0.002)
    assert rows[2] != rows[1] == [1.0, 1.0]
    assert "devices shared one set of weights" in output.splitlines()[-1]
