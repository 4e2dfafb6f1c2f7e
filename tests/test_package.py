"""What importing the package brings in."""

import os
import subprocess
import sys


def test_import_brings_in_keras_and_numpy_only():
    code = """
import sys, keras
before = set(sys.modules)
import keras_dwa
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
"""
    brought_in = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(brought_in) - {"numpy"} == {"keras_dwa"}
