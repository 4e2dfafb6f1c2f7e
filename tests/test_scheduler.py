"""A schedule sets the factors of each epoch as it starts, including the first."""

import itertools
import re

import keras
import pytest
from common import (
    BACKEND,
    NAMES,
    ComputeLoss,
    Lambda,
    check_base_loss,
    compiled,
    dict_model,
    fit,
    one_backend,
    train,
)
from run_to_kill import Stop

from keras_dwa import LossWeightScheduler

BASE = {"easy": 1.0, "hard": 4.0}


def ramp(epoch, factors):
    return {"hard": epoch / 4}


def grow(epoch, factors):
    return {"hard": 2.0 * factors["hard"]}


# `test_windows.py` has this for windows, and for a compound loss.
def test_each_epoch_has_its_factors_and_a_head_that_is_off_does_not_move():
    factors, kernels = [0.0, 1.0, 0.5, 0.0], []
    scheduler = LossWeightScheduler(BASE, lambda epoch: {"hard": factors[epoch]})
    model = dict_model()
    look = Lambda(on_epoch_end=lambda epoch, logs: kernels.append(model.get_weights()[-2]))
    history = train(model, scheduler, epochs=4, others=[look], validation_split=0.2)
    moved = [(old != new).any() for old, new in itertools.pairwise(kernels)]
    assert moved == [True, True, False]
    assert history["hard_weight"] == [0.0, 4.0, 2.0, 0.0]
    assert history["easy_weight"] == [1.0] * 4
    check_base_loss(history, BASE)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras traces nothing on torch")
def test_factors_of_a_compound_loss_move_without_a_trace():
    calls, by_epoch = [], []

    class Traced(ComputeLoss):
        def compute_loss(self, *args, **kwargs):
            calls.append(1)
            return super().compute_loss(*args, **kwargs)

    scheduler = LossWeightScheduler(NAMES, ramp)
    look = Lambda(on_epoch_end=lambda epoch, logs: by_epoch.append(len(calls)))
    fit(compiled(Traced(scheduler), scheduler), scheduler, look, epochs=4)
    # On JAX, Keras 3.10 compiles the step twice.
    assert by_epoch[1] == by_epoch[3] < 5


@one_backend
def test_step_continues_without_any_losses():
    scheduler = LossWeightScheduler(NAMES, ramp)
    assert scheduler.factors == {"easy": 1.0, "hard": 0.0}
    assert scheduler.step() == {"easy": 1.0, "hard": 0.25}
    assert scheduler.step({"easy": 1.0, "hard": 2.0}) == {"easy": 1.0, "hard": 0.5}
    assert scheduler._weights.state.periods == 1
    scheduler.reset()
    assert scheduler.factors == {"easy": 1.0, "hard": 0.0}
    assert scheduler.step()["hard"] == 0.25


@one_backend
def test_schedule_must_return_factors():
    with pytest.raises(ValueError, match=r"schedule` for epoch 1: expected a dict.* Found 3\.0"):
        LossWeightScheduler(NAMES, lambda epoch: 3.0)


@one_backend
def test_schedule_gets_the_factors_of_the_epoch_before_may_change_them_and_hold_all():
    def change(epoch, factors):
        factors["hard"] *= 2
        return None if epoch == 2 else factors

    scheduler = LossWeightScheduler(NAMES, change)
    assert scheduler.factors["hard"] == 2.0
    assert [scheduler.step()["hard"] for _ in range(3)] == [4.0, 4.0, 8.0]


@one_backend
@pytest.mark.parametrize(
    "schedule",
    [
        lambda epoch: {"hard": epoch / 4},
        lambda *arguments: ramp(*arguments),
        lambda epoch, quarter=0.25: {"hard": quarter * epoch},
        [{"hard": 0.0}, {"hard": 0.25}, {"hard": 0.5}].__getitem__,
    ],
    ids=["one_argument", "any_arguments", "default_of_its_own", "no_signature"],
)
def test_schedule_takes_the_epoch_alone_or_the_factors_too(schedule):
    scheduler = LossWeightScheduler(NAMES, schedule)
    assert [scheduler.step()["hard"] for _ in range(2)] == [0.25, 0.5]


@one_backend
def test_factors_that_a_schedule_leaves_out_may_be_assigned():
    scheduler = LossWeightScheduler(NAMES, ramp)
    scheduler.assign({"easy": 5.0, "hard": 7.0})
    history = train(dict_model(), scheduler, epochs=2)
    assert (history["easy_weight"], history["hard_weight"]) == ([5.0, 5.0], [0.0, 0.25])
    scheduler.assign({"easy": 6.0})
    assert scheduler.step() == {"easy": 6.0, "hard": 0.5}


@one_backend
def test_schedule_that_loaded_the_state_of_another_rule_may_be_assigned(dwa):
    scheduler, file = LossWeightScheduler(NAMES, ramp), {}
    dwa._weights.save_own_variables(file)
    scheduler._weights.load_own_variables(file)
    scheduler.assign({"easy": 3.0})
    assert scheduler.step() == {"easy": 3.0, "hard": 0.25}


@one_backend
def test_resumed_run_has_the_factors_of_the_epoch_that_comes_next(tmp_path):
    def fit(names, *others):
        backup = keras.callbacks.BackupAndRestore(tmp_path, save_freq=7)
        scheduler = LossWeightScheduler(names, grow)
        return train(dict_model(), scheduler, others=[backup, *others])["hard_weight"]

    with pytest.raises(KeyboardInterrupt):
        fit(NAMES, Stop(1, 3))
    # The same outputs in another order.
    assert fit(NAMES[::-1]) == [4.0, 8.0]


@one_backend
def test_verbose_prints_the_weights_at_the_start_of_each_epoch(capsys):
    train(dict_model(), LossWeightScheduler(NAMES, ramp, verbose=1), epochs=2)
    assert capsys.readouterr().out == (
        "\nEpoch 1: LossWeightScheduler setting loss weights to easy: 1.0000, hard: 0.0000.\n"
        "\nEpoch 2: LossWeightScheduler setting loss weights to easy: 1.0000, hard: 0.2500.\n"
    )


@one_backend
def test_schedule_must_be_a_function():
    with pytest.raises(ValueError, match=re.escape("Found `schedule = {'hard': 0.5}`")):
        LossWeightScheduler(NAMES, {"hard": 0.5})


@one_backend
def test_step_within_fit_is_an_error():
    scheduler = LossWeightScheduler(NAMES, ramp)
    step = Lambda(on_epoch_begin=lambda epoch, logs: scheduler.step())
    with pytest.raises(RuntimeError, match=r"which `fit` does itself.*\n.*weighting.loss_weights"):
        train(dict_model(), scheduler, others=[step])
