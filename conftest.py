"""Runs the code in the README and in each page of `docs/`, in order."""

import re
from pathlib import Path

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

PARSERS = [PythonCodeBlockParser(), SkipParser()]


def data_and_model(namespace):
    """Gives a page what the README's first block has before it makes a model."""
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)\nmodel = build_model\(\)\n", readme, re.DOTALL)
    exec(block[1], namespace)


readme = Sybil(PARSERS, patterns=["README.md"])
docs = Sybil(PARSERS, patterns=["docs/*.md"], setup=data_and_model)
pytest_collect_file = (readme + docs).pytest()
