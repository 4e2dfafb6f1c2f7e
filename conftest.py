"""Runs the code in the README, in order."""

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

readme = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["README.md"])
pytest_collect_file = readme.pytest()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name == "README.md":
            # One block builds on another: all go to one worker. xdist reads the mark in this hook.
            item.add_marker(pytest.mark.xdist_group("README"))
