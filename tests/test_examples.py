"""The examples, in short, as a user starts them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common import BACKEND

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, epochs):
    """The output of an example, by line."""
    command = [sys.executable, EXAMPLES / name, "--epochs", str(epochs)]
    finished = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def numbers(line):
    return [float(number) for number in re.findall(r"\d+\.\d+(?:e[-+]\d+)?", line)]


def test_digits():
    lines = run("digits.py", 3)
    assert f"on {BACKEND}: 3 epochs" in lines[0]
    rows = [numbers(line) for line in lines if re.match(r" +[123] \|", line)]
    assert len(rows) == 3
    for row in rows:
        assert sum(row[1::2]) == pytest.approx(3, abs=0.003)
    assert rows[0][1::2] == [1.0, 1.0, 1.0] != rows[2][1::2]
    assert rows[2][0] < rows[0][0]
    metrics = [line.split("|") for line in lines[-3:]]
    assert [cells[0].split(":")[0] for cells in metrics] == ["digit", "angle", "upright"]
    assert all(len(numbers(cells[1])) == len(numbers(cells[2])) == 1 for cells in metrics)


def test_custom_loop():
    lines = run(f"custom_loop_{BACKEND}.py", 3)
    rows = [numbers(line) for line in lines]
    assert len(rows) == 3
    assert rows[0][1:] == [1.0, 1.0, 1.0]
    for row in rows:
        assert sum(row[1:]) == pytest.approx(3, abs=0.003)
    assert rows[2][1:] != rows[1][1:] != rows[0][1:]
    assert rows[2][0] < rows[0][0]


def test_vae():
    rows = [numbers(line) for line in run("vae.py", 4)[1:]]
    assert len(rows) == 4
    for row in rows:
        assert row[1] + row[3] == pytest.approx(2, abs=0.003)
    assert rows[3][1] != 1.0
    assert rows[3][4] < rows[0][4]


def test_pinn_nears_the_exact_solution():
    (error,) = numbers(run("pinn.py", 100)[-1])
    assert error < 0.05
