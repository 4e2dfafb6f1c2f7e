"""A `fit` or a step that Ctrl-C interrupts, and the next one."""

import keras
import pytest
from common import (
    ComputeLoss,
    check_run,
    compiled,
    deep_elsewhere,
    dict_model,
    fit,
    joined,
    one_backend,
)
from run_to_kill import Stop


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
