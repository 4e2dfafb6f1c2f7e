"""The benchmarks, in short: none breaks unseen. What they measure is theirs to say."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from common import BACKEND

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(
    path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in ("harness", "models", "run")
)


# Their code is the same on every backend.
ALIKE = {"epoch_end", "import_time", "memory", "recompiling", "windows"}


@pytest.mark.parametrize("script", [s for s in SCRIPTS if BACKEND == "jax" or s not in ALIKE])
def test_script_prints_a_table_of_this_backend(script, capsys, monkeypatch):
    path = str(BENCHMARKS / f"{script}.py")
    if (script, BACKEND) == ("devices", "torch"):  # Starts processes that import it.
        output = subprocess.check_output([sys.executable, path, "--quick"], text=True)
    else:
        monkeypatch.setattr(sys, "argv", [path, "--quick"])
        monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        runpy.run_path(path, run_name="__main__")
        output = capsys.readouterr().out
    header, rule, *rows = output.splitlines()
    assert rows
    assert all(row.startswith(f"| {BACKEND} |") for row in rows)
    assert {line.count(" | ") for line in (rule, *rows)} == {header.count(" | ")}
