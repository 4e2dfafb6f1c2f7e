"""The package as a whole: what an import brings in, its version, its pages."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common import one_backend

ROOT = Path(__file__).parent.parent

pytestmark = one_backend


def test_import_brings_in_keras_and_numpy_only_and_shows_public_names_only():
    code = """
import sys, keras
before = set(sys.modules)
import keras_dwa
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
assert [name for name in dir(keras_dwa) if name[0] != "_"] == sorted(keras_dwa.__all__)
"""
    # Not forked: the process must have imported nothing else before.
    brought_in = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert set(brought_in) - {"numpy"} == {"keras_dwa"}


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("CHANGELOG.md", r"^(?:## \[|Will be )(\d+\.\d+\.\d+)"),
        ("CITATION.cff", r"^version: (.*)$"),
        ("keras_dwa/__init__.py", r'^__version__ = "(.*)"$'),
    ],
)
def test_version_is_the_same_everywhere(file, pattern):
    latest, *_ = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
    assert latest == importlib.metadata.version("keras_dwa")


def test_troubleshooting_has_the_messages_that_there_are():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    ours = page.partition("## What it notices")[2].partition("## Errors that Keras")[0]
    phrases = [part for phrase in re.findall(r'"(.+?)"', ours) for part in phrase.split("...")]
    code = "".join(path.read_text() for path in (ROOT / "keras_dwa").glob("*.py"))
    messages = re.sub(r'"\s+f?"', "", code)
    assert [part for part in phrases if part.strip() not in messages] == []
    assert len(phrases) > 40
