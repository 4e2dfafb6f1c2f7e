"""Runs the code in the README, in order."""

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

readme = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["README.md"])
pytest_collect_file = readme.pytest()
