"""A `fit` that ends early, by an exception, by Ctrl-C or by a callback, and the next one."""

import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from common import LOSSES, ComputeLoss, X, Y, check_run, dict_model, joined, one_backend, train
from run_to_kill import Stop

import keras_dwa
from keras_dwa import CompoundLoss, DynamicWeightAverage
from keras_dwa._loss_weights import State

FIT = {"batch_size": 8, "verbose": 0}


@pytest.fixture
def dwa():
    return DynamicWeightAverage(["easy", "hard"], temperature=0.2)


@pytest.mark.parametrize("way", ["compile", "compute_loss"])
def test_fit_after_an_interrupted_one_goes_on(dwa, way):
    model = dict_model() if way == "compile" else ComputeLoss(dwa)
    how = {"loss": LOSSES, "loss_weights": dwa.loss_weights} if way == "compile" else {}
    model.compile(keras.optimizers.SGD(0.05), **how)
    first = keras.callbacks.History()
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, epochs=5, callbacks=[dwa, first, Stop(2, 1)], **FIT)
    second = model.fit(X, Y, epochs=3, callbacks=[dwa], **FIT)
    assert (first.epoch, second.epoch) == ([0, 1], [0, 1, 2])
    check_run(joined(first.history, second.history), dwa)


@one_backend
def test_loop_after_an_interrupted_fit_says_how_to_end_that_one(dwa):
    model = ComputeLoss(dwa)
    model.compile(keras.optimizers.SGD(0.05))
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, epochs=2, callbacks=[dwa, Stop(1, 1)], **FIT)
    with pytest.raises(RuntimeError, match=r"closes an epoch(.|\n)* weighting\.on_train_end\(\)"):
        dwa.step()
    dwa.on_train_end()
    assert dwa.step() != {"easy": 1.0, "hard": 1.0}


def test_terminate_on_nan_leaves_sane_weights(dwa):
    model = dict_model()
    first = train(model, dwa, epochs=3)
    parameters, moved = model.get_weights(), dwa.step()
    poisoned = {**Y, "hard": np.full_like(Y["hard"], np.nan)}
    callbacks = [dwa, keras.callbacks.TerminateOnNaN()]
    with pytest.warns(UserWarning, match=r"'hard' \(nan\)"):
        stopped = model.fit(X, poisoned, epochs=3, callbacks=callbacks, **FIT)
    assert stopped.epoch == [0]
    assert dwa.step() == moved
    model.set_weights(parameters)
    check_run(joined(first, model.fit(X, Y, epochs=3, callbacks=[dwa], **FIT).history), dwa)


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_swapped_ema_weights_leave_the_loss_weights_alone(dwa, swap_on_epoch):
    model = dict_model()
    optimizer = keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5)
    model.compile(optimizer, LOSSES, loss_weights=dwa.loss_weights)
    callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch), dwa]
    history = model.fit(X, Y, epochs=3, validation_data=(X, Y), callbacks=callbacks, **FIT).history
    check_run(history, dwa)


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


@one_backend
def test_ctrl_c_at_any_line_of_a_step_leaves_the_state_of_before_or_after(dwa):
    compound = CompoundLoss(["easy", "hard"], dwa)

    def state():
        recorded = dwa._weights.recorded()
        stored = {"recorded": -1 if recorded is None else recorded}
        dwa._weights.save_own_variables(stored)
        stored["weights"] = dwa._weights.values()
        return {key: np.asarray(value).tolist() for key, value in stored.items()}

    def third_epoch(interrupted_line=None):
        dwa.reset()
        dwa.step({"easy": 2.0, "hard": 4.0})
        dwa.step({"easy": 1.0, "hard": 3.0})
        compound.combine({"easy": 0.5, "hard": 2.9})
        before = state()
        return lines_run(dwa.step, interrupted_line), before, state()

    lines, before, after = third_epoch()
    assert before != after
    found = [third_epoch(line)[2] for line in range(1, lines + 1)]
    assert [state for state in found if state not in (before, after)] == []
    assert before in found
    assert after in found


@one_backend
def test_ctrl_c_at_any_line_of_the_start_leaves_nothing_of_the_former_model(dwa):
    former, model, base = dict_model(), dict_model(), {"easy": 1.0, "hard": 1.0}
    for each in (former, model):
        each.compile("sgd", LOSSES, loss_weights=dwa.loss_weights)
    # The model that an interrupted `set_model` was given, or `former`.
    warnings.filterwarnings("ignore", "DynamicWeightAverage comes back to a model")

    def start(line=None):
        dwa.set_model(former)
        dwa.step({"easy": 2.0, "hard": 4.0})
        assert dwa.step({"easy": 1.0, "hard": 3.0}) != base
        return lines_run(lambda: dwa.set_model(model), line)

    for line in range(1, start() + 1):
        start(line)
        dwa.set_model(model)
        assert dwa.step() == base
        assert dwa.step({"easy": 1.0, "hard": 2.0}) == base


@one_backend
def test_state_whose_replacement_ctrl_c_interrupts_is_replaced_as_a_whole(dwa):
    class Interrupted:
        """Factors whose first use is interrupted."""

        __array_ufunc__ = None
        uses = 0

        def __rmul__(self, base_weights):
            self.uses += 1
            if self.uses == 1:
                raise KeyboardInterrupt
            return base_weights * np.array([0.5, 1.5])

    state = State(Interrupted(), {}, epochs=7, periods=0, window=np.zeros(4))
    with pytest.raises(KeyboardInterrupt):
        dwa._weights.replace(state)
    assert dwa.step() == {"easy": 0.5, "hard": 1.5}
    assert dwa._weights.state is state
