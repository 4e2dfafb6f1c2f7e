"""Short runs of the benchmarks on JAX: none is broken. Their numbers are not checked."""

import runpy
import sys
from pathlib import Path

import pytest
from common import one_backend

pytestmark = [pytest.mark.deep, one_backend]

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(
    path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in ("harness", "models", "run")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_prints_a_table(script, capsys, monkeypatch):
    path = str(BENCHMARKS / f"{script}.py")
    monkeypatch.setattr(sys, "argv", [path, "--quick"])
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    runpy.run_path(path, run_name="__main__")
    output = capsys.readouterr().out
    header, rule, *rows = output.splitlines()
    assert rows
    assert all(row.startswith("| jax |") for row in rows)
    assert {line.count(" | ") for line in (rule, *rows)} == {header.count(" | ")}
    if script == "reaches_the_loss":
        assert all(row.endswith("| yes |") for row in rows if "| keras_dwa" in row)


def test_study_trains_again_only_what_a_kill_cut_short(tmp_path, capsys, monkeypatch):
    def study():
        runpy.run_path(str(BENCHMARKS / "study" / "run.py"), run_name="__main__")
        return len(capsys.readouterr().out.splitlines())

    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", str(tmp_path)])
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS / "study"), *sys.path])
    assert study() == 20
    results, page = tmp_path / "digits.csv", (tmp_path / "evidence.md").read_text()
    whole = results.read_text()
    results.write_text(whole[:-3])
    assert study() == 1
    assert results.read_text() == whole
    assert (tmp_path / "evidence.md").read_text() == page
