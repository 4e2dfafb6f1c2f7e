"""A `fit` that ends early, by an exception, by Ctrl-C or by a callback, and the next one."""

import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from common import LOSSES, ComputeLoss, X, Y, check_run, dict_model, joined, train

import keras_dwa
from keras_dwa import CompoundLoss, DynamicWeightAverage


@pytest.fixture
def dwa():
    return DynamicWeightAverage(["easy", "hard"], temperature=0.2)


class RaiseWithin(keras.callbacks.Callback):
    """Raises within the given epoch."""

    def __init__(self, epoch, error):
        super().__init__()
        self.at, self.error = epoch, error

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == self.at and batch > 0:
            raise self.error


@pytest.mark.parametrize(
    ("way", "error"), [("compile", KeyboardInterrupt), ("compute_loss", RuntimeError)]
)
def test_fit_after_an_interrupted_one_goes_on(dwa, mode, way, error):
    if way == "compile":
        model = dict_model()
        model.compile(keras.optimizers.SGD(0.05), LOSSES, loss_weights=dwa.loss_weights, **mode)
    else:
        model = ComputeLoss(dwa)
        model.compile(keras.optimizers.SGD(0.05), **mode)
    histories = [keras.callbacks.History() for _ in range(2)]
    arguments = {"batch_size": 8, "verbose": 0}
    callbacks = [dwa, histories[0], RaiseWithin(2, error)]
    with pytest.raises(error):
        model.fit(X, Y, epochs=5, callbacks=callbacks, **arguments)
    model.fit(X, Y, epochs=3, callbacks=[dwa, histories[1]], **arguments)
    assert [history.epoch for history in histories] == [[0, 1], [0, 1, 2]]
    check_run(joined(*(history.history for history in histories)), dwa)


def test_loop_after_an_interrupted_fit_says_how_to_end_that_one(dwa):
    model = ComputeLoss(dwa)
    model.compile(keras.optimizers.SGD(0.05))
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[dwa, RaiseWithin(1, KeyboardInterrupt)])
    with pytest.raises(RuntimeError, match=r"closes an epoch(.|\n)* weighting\.on_train_end\(\)"):
        dwa.step()
    dwa.on_train_end()
    assert dwa.step() != {"easy": 1.0, "hard": 1.0}


def test_terminate_on_nan_leaves_sane_weights(dwa):
    model = dict_model()
    train(model, dwa, epochs=3)
    first, parameters, moved = model.history, model.get_weights(), dwa.step()
    poisoned = {**Y, "hard": np.full_like(Y["hard"], np.nan)}
    callbacks = [dwa, keras.callbacks.TerminateOnNaN()]
    with pytest.warns(UserWarning, match=r"'hard' \(nan\)"):
        stopped = model.fit(X, poisoned, epochs=3, verbose=0, callbacks=callbacks)
    assert stopped.epoch == [0]
    assert dwa.step() == moved
    model.set_weights(parameters)
    second = model.fit(X, Y, batch_size=8, epochs=3, verbose=0, callbacks=[dwa])
    check_run(joined(first.history, second.history), dwa)


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_swapped_ema_weights_leave_the_loss_weights_alone(dwa, swap_on_epoch):
    model = dict_model()
    optimizer = keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5)
    model.compile(optimizer, LOSSES, loss_weights=dwa.loss_weights)
    callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch), dwa]
    arguments = {"batch_size": 8, "verbose": 0, "validation_data": (X, Y)}
    check_run(model.fit(X, Y, epochs=4, callbacks=callbacks, **arguments).history, dwa)


def lines_run(function, interrupted_line=None):
    """Calls a function, with Ctrl-C at a line of the package; returns the number of lines run."""
    package, tracer, lines = str(Path(keras_dwa.__file__).parent), sys.gettrace(), 0

    def trace(frame, event, argument):
        nonlocal lines
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line":
            lines += 1
            if lines == interrupted_line:
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


@pytest.mark.parametrize("way", ["given", "recorded"])
def test_ctrl_c_at_any_line_of_a_step_leaves_the_state_of_before_or_after(dwa, way):
    compound = CompoundLoss(["easy", "hard"], dwa)

    def close_epoch(easy, hard):
        if way == "given":
            return lambda: dwa.step({"easy": easy, "hard": hard})
        compound.combine({"easy": easy, "hard": hard})
        return dwa.step

    def state():
        stored = {"recorded": dwa._weights.recorded_averages()}
        dwa._weights.save_own_variables(stored)
        stored["weights"] = dwa._weights.values()
        return {key: np.asarray(value).tolist() for key, value in stored.items()}

    def third_epoch(interrupted_line=None):
        dwa.reset()
        close_epoch(2.0, 4.0)()
        close_epoch(1.0, 3.0)()
        close = close_epoch(0.5, 2.9)
        before = state()
        return lines_run(close, interrupted_line), before, state()

    lines, before, after = third_epoch()
    assert before != after
    found = [third_epoch(line)[2] for line in range(1, lines + 1)]
    assert [state for state in found if state not in (before, after)] == []
    assert before in found
    assert after in found


def test_ctrl_c_at_any_line_of_the_start_leaves_nothing_of_the_former_model(dwa):
    train(dict_model(), dwa)
    former, model = dwa.model, dict_model()
    moved = dwa.step()
    model.compile("sgd", LOSSES, loss_weights=dwa.loss_weights)
    lines = lines_run(lambda: dwa.set_model(model))
    assert dwa.step() == {"easy": 1.0, "hard": 1.0} != moved
    # The model that an interrupted `set_model` was given, or `former`.
    warnings.filterwarnings("ignore", "DynamicWeightAverage comes back to a model")
    for line in range(1, lines + 1):
        dwa.set_model(former)
        dwa.step({"easy": 2.0, "hard": 4.0})
        assert dwa.step({"easy": 1.0, "hard": 3.0}) != {"easy": 1.0, "hard": 1.0}
        lines_run(lambda: dwa.set_model(model), line)
        dwa.set_model(model)
        assert dwa.step() == {"easy": 1.0, "hard": 1.0}
        assert dwa.step({"easy": 1.0, "hard": 2.0}) == {"easy": 1.0, "hard": 1.0}
