"""Runs the code of the README and of each page in `docs/`, and compares what it prints."""

import contextlib
import doctest
import io

import keras
import pytest
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

run = PythonEvaluator()


def run_and_keep_output(example):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(example)
    example.namespace["printed"] = printed.getvalue()


def compare(example):
    """The output that a page shows, where `...` stands for anything."""
    printed = example.namespace.pop("printed")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if not doctest.OutputChecker().check_output(example.parsed, printed, flags):
        return f"The page shows\n{example.parsed}\nbut its code printed\n{printed}"


def compare_on_jax(example):
    # Numbers that the backends' random initial weights lead to.
    if keras.backend.backend() == "jax":
        return compare(example)


pytest_collect_file = Sybil(
    [
        CodeBlockParser("python", run_and_keep_output),
        CodeBlockParser("text", compare),
        CodeBlockParser('text title="On JAX"', compare_on_jax),
        SkipParser(),
    ],
    patterns=["README.md", "docs/*.md"],
).pytest()

# Their code computes on the host: on JAX it runs in `nox`, on the others in `nox -s deep`.
PAGES_OF_THE_HOST = {
    *("choosing", "how_it_works", "known_rules", "plots", "rules", "steady", "tuning", "windows")
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in PAGES_OF_THE_HOST and keras.backend.backend() != "jax":
            item.add_marker(pytest.mark.deep)
