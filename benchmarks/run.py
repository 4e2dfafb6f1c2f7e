"""Measures all tables of this folder's README again: about an hour on two cores.

    python benchmarks/run.py
    python benchmarks/run.py fit_step combine

Each table is the output of a script on each backend, in its own process. `nox -s benchmarks`
installs what they compare with, and runs this.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
BACKENDS = ("jax", "tensorflow", "torch")
PACKAGES = ("keras", "jax", "tensorflow-cpu", "torch", "torchjd", "LibMTL", "softadapt")


def printed(script, backend):
    """The lines of a script's table."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, str(FOLDER / f"{script}.py")]
    print(f"{time.strftime('%H:%M:%S')} {script} on {backend}", flush=True)
    return subprocess.check_output(command, env=environment, text=True).splitlines()


def table(script):
    header, rule, *rows = printed(script, BACKENDS[0])
    for backend in BACKENDS[1:]:
        rows += printed(script, backend)[2:]
    return "\n".join([header, rule, *rows])


def machine():
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    cores = len(os.sched_getaffinity(0))
    return (
        f"{time.strftime('%Y-%m-%d')}, {cores} cores of {processor[1]}, Python "
        f"{platform.python_version()}, {', '.join(versions)}."
    )


def main():
    readme = FOLDER / "README.md"
    scripts = re.findall(r"<!-- (\w+)\.py -->", readme.read_text())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", default=scripts, metavar="script")
    for script in parser.parse_args().scripts:
        block = f"<!-- {script}.py -->\n{table(script)}\n\nMeasured {machine()}\n<!-- end -->"
        pattern = rf"<!-- {script}\.py -->.*?<!-- end -->"
        replaced = re.sub(
            pattern, lambda _, block=block: block, readme.read_text(), flags=re.DOTALL
        )
        readme.write_text(replaced)


if __name__ == "__main__":
    main()
