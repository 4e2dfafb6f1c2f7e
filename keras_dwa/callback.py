"""Where callbacks that release 0.1.0 pickled are looked for: they do not load, and are told why."""

from typing import Never


def __getattr__(name: str) -> Never:
    if name != "DynamicWeightAverage":
        raise AttributeError(name)
    raise RuntimeError(
        "The callback was pickled by keras_dwa 0.1.0, whose state this release does not read. Make "
        "it anew, to start from the base weights:\n    keras_dwa.DynamicWeightAverage(outputs)"
    )
