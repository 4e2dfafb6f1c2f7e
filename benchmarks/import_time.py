"""What `import keras_dwa` costs after `import keras`, and which modules of others it imports.

    KERAS_BACKEND=jax python benchmarks/import_time.py

Each round is a new process that imports one after the other and takes the time of each, so that
what Keras imports itself, the backend above all, is not counted to keras_dwa. A first process,
which is not counted, leaves the files in the caches of Python and of the system. Printed are the
medians, with the quartiles, and the modules in `sys.modules` that `import keras` had not put there,
apart from those of keras_dwa itself.
"""

import json
import os
import subprocess
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
from harness import parse, print_table, shown

CODE = """
import json, sys, time
start = time.perf_counter()
import keras
middle = time.perf_counter()
before = set(sys.modules)
import keras_dwa
end = time.perf_counter()
modules = sorted(name for name in set(sys.modules) - before if name.split(".")[0] != "keras_dwa")
print(json.dumps([1e3 * (middle - start), 1e3 * (end - middle), modules]))
"""


def measured():
    """Milliseconds for keras and for keras_dwa, and the names of the modules."""
    # With the paths of this process, where it found keras_dwa.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    printed = subprocess.check_output([sys.executable, "-c", CODE], env=environment, text=True)
    return json.loads(printed.splitlines()[-1])


def main():
    is_quick = parse(__doc__).quick
    if not is_quick:
        measured()
    of_keras, ours, modules = zip(*[measured() for _ in range(1 if is_quick else 11)], strict=True)
    names = ", ".join(f"`{name}`" for name in modules[0]) or "none"
    print_table(
        [
            "backend",
            "`import keras`, ms",
            "`import keras_dwa` after it, ms",
            "other modules",
            "names",
        ],
        [(keras.backend.backend(), shown(of_keras, 0), shown(ours), len(modules[0]), names)],
    )


if __name__ == "__main__":
    main()
