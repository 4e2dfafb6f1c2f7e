"""A `fit` or a step that Ctrl-C interrupts, and the next one."""

import sys

import keras
import pytest
from common import (
    NAMES,
    ComputeLoss,
    check_run,
    compiled,
    deep_elsewhere,
    dict_model,
    fit,
    joined,
    move,
    one_backend,
)
from run_to_kill import Stop

import keras_dwa
from keras_dwa import CompoundLoss


# `test_windows.py` has this for windows.
@deep_elsewhere
@pytest.mark.parametrize("make_model", [lambda dwa: dict_model(), ComputeLoss])
def test_fit_after_an_interrupted_one_continues(dwa, make_model):
    model, first = compiled(make_model(dwa), dwa), keras.callbacks.History()
    with pytest.raises(KeyboardInterrupt):
        fit(model, dwa, first, Stop(2, 1))
    second = fit(model, dwa)
    assert first.epoch == [0, 1]
    check_run(joined(first.history, second), dwa)


@one_backend
def test_loop_after_an_interrupted_fit_says_how_to_end_that_one(dwa):
    with pytest.raises(KeyboardInterrupt):
        fit(compiled(ComputeLoss(dwa), dwa), dwa, Stop(1, 1))
    message = r"ends an epoch.*\n    weighting\.loss_weights\n.*\n    weighting\.on_train_end\(\)"
    with pytest.raises(RuntimeError, match=message):
        dwa.step()
    dwa.on_train_end()
    assert dwa.step() != {"easy": 1.0, "hard": 1.0}


def lines_run(function, interrupted_line=None):
    """Calls a function, with Ctrl-C at a line of the package; returns the number of lines run."""
    package, tracer, lines = keras_dwa.__path__[0], sys.gettrace(), 0

    def trace(frame, event, argument):
        nonlocal lines
        if not frame.f_code.co_filename.startswith(package):
            return None
        lines += event == "line"
        if event == "line" and lines == interrupted_line:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        assert interrupted_line is not None
    finally:
        sys.settrace(tracer)
    return lines


@one_backend
def test_ctrl_c_at_any_line_of_a_step_leaves_the_state_of_before_or_after(dwa):
    compound = CompoundLoss(NAMES, dwa)

    def state():
        stored = {"weights": dwa._weights.vector, "recorded": dwa._weights.recorded()}
        dwa._weights.save_own_variables(stored)
        return str({key: keras.ops.convert_to_numpy(value) for key, value in stored.items()})

    def third_epoch(interrupted_line=None):
        dwa.reset()
        move(dwa)
        compound.combine({"easy": 0.5, "hard": 2.9})
        before = state()
        return lines_run(dwa.step, interrupted_line), before, state()

    lines, before, after = third_epoch()
    assert before != after
    assert {third_epoch(line)[2] for line in range(1, lines + 1)} == {before, after}


@one_backend
def test_ctrl_c_within_a_line_that_replaces_the_state_lets_it_finish(dwa, monkeypatch):
    def interrupt(weights):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(dwa._weights.vector, "assign", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dwa.assign({"easy": 0.5})
    assert dwa.factors == dwa.step() == {"easy": 0.5, "hard": 1.0}
    assert float(dwa.loss_weights["easy"]) == 0.5
