"""The benchmarks, in short: none breaks unseen. What they measure is theirs to say."""

import csv
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
    if script == "reaches_the_loss":
        assert all(row.endswith("| yes |") for row in rows if "| keras_dwa" in row)


@pytest.mark.skipif(BACKEND != "jax", reason="its code is the same on every backend")
def test_study_trains_again_only_what_a_kill_cut_short(tmp_path, capsys, monkeypatch):
    def study():
        runpy.run_path(str(BENCHMARKS / "study" / "run.py"), run_name="__main__")
        return len(capsys.readouterr().out.splitlines())

    arguments = ["run.py", "--quick", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS / "study"), *sys.path])
    assert study() == 10
    results, page = tmp_path / "vae.csv", (tmp_path / "evidence.md").read_text()
    whole = results.read_text()
    results.write_text(whole[:-30])
    assert study() == 1
    assert results.read_text() == whole
    assert (tmp_path / "evidence.md").read_text() == page
    # A method is as good as its epochs that are best on validation, against equal weights'.
    rows = list(csv.DictReader(whole.splitlines()))
    best = {}
    for row in rows:
        key = row["method"], row["seed"]
        best[key] = min(best.get(key, row), row, key=lambda row: float(row["negative ELBO: val"]))
    values = {key: float(row["negative ELBO: test"]) for key, row in best.items()}
    reference = (values["equal", "0"] + values["equal", "1"]) / 2
    differences = [
        100 * (values["equal", seed] - values["static, tuned", seed]) / reference for seed in "01"
    ]
    assert f"| static, tuned | {sum(differences) / 2:+.1f} (" in page
