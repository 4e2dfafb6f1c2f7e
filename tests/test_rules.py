"""Rules of one's own: what they get, what they return, what they remember."""

import itertools
import pickle
import re

import keras
import numpy as np
import pytest
from common import (
    BACKEND,
    LOSSES,
    ComputeLoss,
    X,
    Y,
    dict_model,
    one_backend,
    train,
)

from keras_dwa import CompoundLoss, DynamicWeightAverage, LossWeighting

NAMES = ["easy", "hard"]


class FollowValidation(LossWeighting):
    """Each factor is the output's loss in validation over that in training."""

    def update(self, epoch, logs):
        return {name: logs[f"val_{name}_loss"] / logs[f"{name}_loss"] for name in self.outputs}


class HalveHard(LossWeighting):
    """Halves a weight once a metric passes a threshold."""

    threshold = 0.0

    def update(self, epoch, logs):
        if logs["easy_mae"] < self.threshold:
            return {"hard": 0.5 * self.factors["hard"]}
        return None


class Count(LossWeighting):
    """Counts epochs in its state, and moves the weights by it."""

    def update(self, epoch, logs):
        self.state.setdefault("epochs", np.array(0))
        self.state["epochs"] += 1
        return {"easy": 1.0 / self.state["epochs"]}


def test_rule_that_reads_the_validation_losses_moves_the_weights(mode):
    rule = FollowValidation(NAMES)
    history = train(dict_model(), rule, mode=mode, validation_split=0.2)
    for name in NAMES:
        rates = np.array(history[f"val_{name}_loss"]) / history[f"{name}_loss"]
        np.testing.assert_allclose(history[f"{name}_weight"], [1.0, *rates[:2]], rtol=1e-6)
    totals = sum(np.array(history[f"{name}_weight"]) * history[f"{name}_loss"] for name in NAMES)
    np.testing.assert_allclose(history["loss"], totals, rtol=1e-5)


@one_backend
def test_rule_that_reads_a_metric_halves_a_weight_once_it_passes_a_threshold():
    def fit(rule):
        keras.utils.set_random_seed(0)
        model, weights = dict_model(), rule.loss_weights
        model.compile("sgd", LOSSES, loss_weights=weights, metrics={"easy": ["mae"]})
        return model.fit(X, Y, epochs=4, verbose=0, callbacks=[rule]).history

    rule = HalveHard({"easy": 1.0, "hard": 2.0})
    errors = fit(rule)["easy_mae"]
    assert rule.factors["hard"] == 1.0
    rule.threshold = (errors[1] + errors[2]) / 2
    assert fit(rule)["hard_weight"] == [2.0, 2.0, 2.0, 1.0]


@one_backend
def test_rule_gets_the_whole_logs_of_its_epoch():
    seen = []

    class Look(LossWeighting):
        def update(self, epoch, logs):
            seen.append((epoch, dict(logs)))

    history = train(dict_model(), Look(NAMES), epochs=2, validation_split=0.2)
    assert seen == [(e, {key: history[key][e] for key in history}) for e in range(2)]


@pytest.mark.parametrize("factor", [0.5, 0.0])
def test_loss_of_a_single_output_is_weighted_logged_and_given_to_the_rule(mode, factor):
    """Keras logs it as `loss` alone, weighted already."""
    seen = []

    class Look(LossWeighting):
        def update(self, epoch, logs):
            seen.append(logs["output_loss"])
            return {"output": factor}

    rule = Look({"output": 4.0})
    model = keras.Sequential([keras.layers.Dense(1)])
    fit = {"mode": mode, "optimizer": keras.optimizers.SGD(0.0), "validation_split": 0.2}
    history = train(model, rule, y=Y["easy"], loss="mse", epochs=2, **fit)
    assert history["output_weight"] == [4.0, 4 * factor]
    assert history["loss"][1] == pytest.approx(factor * history["loss"][0])
    # What it would be at weight 4, nothing tells at weight 0.
    for key in ("loss", "val_loss"):
        base_loss = history[key.replace("loss", "base_loss")]
        expected = [history[key][0], history[key][0] if factor else np.nan]
        np.testing.assert_allclose(base_loss, expected, rtol=1e-5)
    assert seen[0] == pytest.approx(history["loss"][0] / 4)
    assert "output_loss" not in history


def test_rule_moves_the_weights_of_a_loop():
    rule = Count(NAMES)
    compound = CompoundLoss(NAMES, rule)
    for epoch in range(3):
        compound.combine({"easy": 4.0, "hard": 1.0})
        assert rule.step() == pytest.approx({"easy": 1 / (epoch + 1), "hard": 1.0})
    assert rule.step({"easy": 4.0, "hard": 1.0})["easy"] == 0.25


@one_backend
def test_hooks_may_be_called_by_a_loop():
    model, rule = dict_model(), Count({"easy": 1.0, "hard": 3.0})
    model.compile("sgd", LOSSES, loss_weights=rule.loss_weights)
    rule.set_model(model)
    rule.on_train_begin()
    for epoch, easy_weight in enumerate([1.0, 1.0, 0.5]):
        rule.on_epoch_begin(epoch)
        logs = model.train_on_batch(X, Y, return_dict=True)
        rule.on_train_batch_end(0)
        logs.update(val_loss=easy_weight * 2.0 + 3 * 5.0, val_easy_loss=2.0, val_hard_loss=5.0)
        rule.on_epoch_end(epoch, logs)
        assert (logs["easy_weight"], logs["val_base_loss"]) == (easy_weight, 17.0)
        model.reset_metrics()
    rule.on_epoch_begin(3)
    rule.on_train_batch_end(0)
    with pytest.raises(ValueError, match="`logs` lacks"):
        rule.on_epoch_end(3)


@one_backend
def test_rule_without_an_override_moves_nothing():
    weighting = LossWeighting(NAMES)
    history = train(dict_model(), weighting)
    assert history["easy_weight"] == history["hard_weight"] == [1.0] * 3
    assert weighting.update(0, {}) is None


# What it returns.


@one_backend
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"third": 1.0}, "gave factors for ['third']. The outputs are ['easy', 'hard']."),
        ({"easy": float("nan")}, "gave nan for 'easy'. A factor is a finite number >= 0"),
        ({"hard": -1.0}, "gave -1.0 for 'hard'"),
        ({"hard": np.inf}, "gave inf for 'hard'"),
        ([1.0, 1.0], "gave [1.0, 1.0]. It must give a dict of name to factor."),
        (0.5, "gave 0.5. It must give"),
        (KeyError("mine"), "mine"),
    ],
)
def test_nonsense_is_an_error_that_names_the_rule_and_leaves_all_as_it_was(returned, message):
    class Nonsense(LossWeighting):
        def update(self, epoch, logs):
            total = self.state.setdefault("total", np.zeros(2))
            total += logs["easy_loss"]
            if epoch < 2:
                return {"easy": 0.5}
            if isinstance(returned, Exception):
                raise returned
            return returned

    rule = Nonsense(NAMES)
    compound = CompoundLoss(NAMES, rule)
    for _ in range(2):
        rule.step({"easy": 2.0, "hard": 1.0})
    compound.combine({"easy": 8.0, "hard": 1.0})
    source = "" if isinstance(returned, Exception) else "`Nonsense.update` after epoch 3 "
    with pytest.raises((ValueError, KeyError), match=re.escape(source + message)):
        rule.step()
    assert rule.factors == {"easy": 0.5, "hard": 1.0}
    assert {name: float(weight) for name, weight in rule.loss_weights.items()} == rule.factors
    np.testing.assert_array_equal(rule.state["total"], [4.0, 4.0])
    assert rule._weights.recorded()[0, :-1].tolist() == [8.0, 1.0]


@one_backend
@pytest.mark.parametrize(
    ("key", "value"),
    [("what", None), ("what", "text"), ("what", [None]), ("what", np.array(["a"])), (3, 1.0)],
)
def test_state_must_be_arrays_of_numbers_by_name(key, value):
    class Remember(LossWeighting):
        def update(self, epoch, logs):
            self.state[key] = value

    rule = Remember(NAMES)
    found = re.escape(f"`Remember.update` after epoch 1 left {value!r} in `state[{key!r}]`.")
    with pytest.raises(ValueError, match=found):
        rule.step({"easy": 1.0, "hard": 1.0})
    assert rule.state == {}


@one_backend
def test_state_is_read_only_outside_of_update():
    with pytest.raises(TypeError, match="does not support item assignment"):
        Count(NAMES).state["epochs"] = np.array(3)


# What it remembers.


MEMORY = {
    "float64": np.array([0.1, np.nan, -0.0, 5e-324]),
    "float32": np.float32([[0.1], [3e38]]),
    "int64": np.array(2**62),
    "bool": np.array([True, False]),
    "none yet": np.empty((0, 2)),
    "complex/with a path": np.array(1 + 2j),
    "": np.arange(3, dtype="uint8"),
}


class Remember(LossWeighting):
    def update(self, epoch, logs):
        if epoch == 0:
            self.state.update(MEMORY)
        return {"easy": 1 / 3, "hard": 0.0}


@pytest.mark.parametrize("way", ["weights.h5", "keras", "pickle"])
def test_state_and_factors_are_restored_bit_for_bit(tmp_path, way):
    model, rule = dict_model(), Remember(NAMES)
    train(model, rule, epochs=2)
    if way == "pickle":
        resumed = pickle.loads(pickle.dumps(rule))
    else:
        file = tmp_path / f"file.{way}"
        model.save_weights(file) if way == "weights.h5" else model.save(file)
        # The same outputs in another order.
        other, resumed = dict_model(), Remember(NAMES[::-1])
        other.compile("sgd", LOSSES, loss_weights=resumed.loss_weights)
        resumed.set_model(other)
        other.load_weights(file)
    assert resumed.factors == rule.factors == {"easy": 1 / 3, "hard": 0.0}
    assert list(resumed.state) == list(MEMORY)
    for name, value in MEMORY.items():
        np.testing.assert_array_equal(resumed.state[name], value, strict=True)
    resumed.reset()
    assert (resumed.state, resumed.factors) == ({}, {"easy": 1.0, "hard": 1.0})


@one_backend
def test_pickle_of_release_0_1_0_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"by keras_dwa 0\.1\.0.*\n.*DynamicWeightAverage\(out"):
        pickle.loads(b"ckeras_dwa.callback\nDynamicWeightAverage\n.")
    with pytest.raises(AttributeError, match="Other"):
        pickle.loads(b"ckeras_dwa.callback\nOther\n.")


@one_backend
def test_rule_goes_on_with_another_ones_factors_but_not_its_state(tmp_path):
    model, dwa = dict_model(), DynamicWeightAverage(NAMES)
    train(model, Count(NAMES), epochs=2)
    model.save_weights(tmp_path / "file.weights.h5")
    model.compile("sgd", LOSSES, loss_weights=dwa.loss_weights)
    dwa.set_model(model)
    model.load_weights(tmp_path / "file.weights.h5")
    assert dwa.state == {}
    both = r"that a Count left in the file, without its `state`\.\nDynamicWeightAverage goes on"
    with pytest.warns(UserWarning, match=both):
        history = model.fit(X, Y, initial_epoch=5, epochs=8, verbose=0, callbacks=[dwa]).history
    assert history["easy_weight"][:2] == [0.5, 0.5]
    assert sum(dwa.factors.values()) == pytest.approx(2)


@one_backend
def test_second_fit_goes_on_and_a_second_model_starts_afresh():
    rule, model = Count(NAMES), dict_model()
    train(model, rule, epochs=2)
    assert train(model, rule, epochs=2)["easy_weight"] == pytest.approx([1 / 2, 1 / 3])
    assert train(dict_model(), rule, epochs=2)["easy_weight"] == [1.0, 1.0]


# `CompoundLoss` and checks, as with Dynamic Weight Average.


def test_rule_with_a_compound_loss_under_fit(mode):
    rule = FollowValidation(NAMES)
    model = ComputeLoss(rule)
    model.compile(keras.optimizers.SGD(0.05), **mode)
    fit = {"batch_size": 8, "epochs": 3, "verbose": 0, "validation_split": 0.2}
    history = model.fit(X, Y, callbacks=[rule], **fit).history
    for name in NAMES:
        rates = np.array(history[f"val_{name}_loss"]) / history[f"{name}_loss"]
        np.testing.assert_allclose(history[f"{name}_weight"], [1.0, *rates[:2]], rtol=1e-6)


@one_backend
def test_verbose_prints_what_a_rule_sets_and_nothing_without_one(capsys):
    train(dict_model(), Count(NAMES, verbose=1), epochs=1)
    assert capsys.readouterr().out == (
        "\nEpoch 1: Count setting loss weights to easy: 1.0000, hard: 1.0000.\n"
    )
    train(dict_model(), LossWeighting(NAMES, verbose=1), epochs=1)
    assert capsys.readouterr().out == ""


@one_backend
def test_rule_is_shown_by_its_name_outputs_and_current_weights():
    assert repr(Count({"easy": 2.0})) == "Count({'easy': 2.0}, weights={'easy': 2.0})"
    dwa = DynamicWeightAverage(NAMES)
    dwa.step({"easy": 1.0, "hard": 1.0})
    dwa.step({"easy": 0.5, "hard": 0.9})
    assert repr(dwa) == (
        "DynamicWeightAverage(['easy', 'hard'], temperature=2.0, "
        "weights={'easy': 0.9003, 'hard': 1.1})"
    )


@pytest.mark.skipif(BACKEND != "torch", reason="one backend is enough for two packages' numbers")
def test_soft_adapt_of_the_example_is_that_of_its_package():
    from own_rule import SoftAdapt
    from softadapt.algorithms import SoftAdapt as Reference

    random = np.random.default_rng(0)
    losses = random.uniform(0.1, 3, size=(6, 3))
    rule, reference = SoftAdapt(["a", "b", "c"]), Reference(beta=SoftAdapt.beta, accuracy_order=1)
    rule.step(dict(zip("abc", losses[0], strict=True)))
    assert set(rule.factors.values()) == {1.0}
    for former, latter in itertools.pairwise(losses):
        factors = rule.step(dict(zip("abc", latter, strict=True)))
        expected = reference.get_component_weights(*np.stack([former, latter]).T, verbose=False)
        np.testing.assert_allclose(list(factors.values()), expected, rtol=1e-5)
