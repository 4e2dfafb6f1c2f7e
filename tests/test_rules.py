"""Custom rules: what they get, what they return, what they remember."""

import pickle
import re

import keras
import numpy as np
import pytest
from common import NAMES, Y, compiled, dict_model, fit, move, one_backend, train

from keras_dwa import CompoundLoss, DynamicWeightAverage, LossWeighting


class Count(LossWeighting):
    """Counts epochs in its state, and moves the weights by the count."""

    def update(self, epoch, logs):
        self.state["epochs"] = self.state.get("epochs", 0) + np.array(1)
        return {"easy": 1.0 / self.state["epochs"]}


# What it gets.


@one_backend
def test_rule_gets_the_whole_logs_of_its_epoch():
    class Look(LossWeighting):
        def update(self, epoch, logs):
            seen.append((epoch, dict(logs)))

    seen, metrics = [], {"metrics": {"easy": ["mae"]}}
    history = train(dict_model(), Look(NAMES), mode=metrics, epochs=2, validation_split=0.2)
    assert "val_easy_loss" in history
    assert "val_easy_mae" in history
    assert seen == [(e, {key: history[key][e] for key in history}) for e in range(2)]


@pytest.mark.parametrize(
    ("loss", "factor"), [("mse", 0.5), (["mse"], 0.5), ({"output": "mse"}, 0.0)]
)
def test_loss_of_a_single_output_is_weighted_logged_and_given_to_the_rule(loss, factor):
    """Keras logs its loss only as `loss`, already weighted."""

    class Look(LossWeighting):
        def update(self, epoch, logs):
            seen.append(logs["output_loss"])
            return {"output": factor}

    inputs, seen = keras.Input((4,)), []
    model = keras.Model(inputs, keras.layers.Dense(1, name="output")(inputs))
    fit = {"loss": loss, "optimizer": keras.optimizers.SGD(0.0), "validation_split": 0.2}
    history = train(model, Look({"output": 4.0}), y=Y["easy"], epochs=2, **fit)
    assert history["output_weight"] == [4.0, 4 * factor]
    assert history["loss"][1] == pytest.approx(factor * history["loss"][0])
    # At weight 0, the unweighted loss is unknown.
    for key in ("loss", "val_loss"):
        base_loss = history[key.replace("loss", "base_loss")]
        expected = [history[key][0], history[key][0] if factor else np.nan]
        np.testing.assert_allclose(base_loss, expected, rtol=1e-5)
    assert seen[0] == pytest.approx(history["loss"][0] / 4)
    assert "output_loss" not in history


@one_backend
def test_hooks_without_the_begin_of_a_training_say_so():
    rule = Count(NAMES)
    rule.on_train_batch_begin(0)
    rule.on_train_batch_end(0)
    with pytest.raises(RuntimeError, match="`on_train_begin` was not called"):
        rule.on_epoch_end(0)


# What it returns.


@one_backend
def test_rule_without_an_override_moves_and_prints_nothing(capsys):
    weighting = LossWeighting(NAMES, verbose=1)
    history = train(dict_model(), weighting, epochs=2)
    assert history["easy_weight"] == history["hard_weight"] == [1.0, 1.0]
    assert weighting.update(0, {}) is None
    assert capsys.readouterr().out == ""


@one_backend
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"easy": np.nan}, "`Nonsense.update` after epoch 2: found nan for 'easy'. A factor must"),
        ([1.0, 1.0], "expected a dict of name to factor. Found [1.0, 1.0]."),
        (KeyError("mine"), "mine"),
    ],
)
def test_nonsense_is_an_error_that_names_the_rule_and_leaves_all_as_it_was(returned, message):
    class Nonsense(LossWeighting):
        def update(self, epoch, logs):
            total = self.state.setdefault("total", np.zeros(1))
            total += logs["easy_loss"]
            if epoch == 0:
                return {"easy": 0.5}
            if isinstance(returned, Exception):
                raise returned
            return returned

    rule = Nonsense(NAMES)
    compound = CompoundLoss(NAMES, rule)
    rule.step({"easy": 2.0, "hard": 1.0})
    compound.combine({"easy": 8.0, "hard": 1.0})
    with pytest.raises((ValueError, KeyError), match=re.escape(message)):
        rule.step()
    assert rule.factors == {"easy": 0.5, "hard": 1.0}
    assert {name: float(weight) for name, weight in rule.loss_weights.items()} == rule.factors
    assert rule.state["total"] == 2.0
    assert rule._weights.recorded().tolist() == [8.0, 1.0, 1.0]


@one_backend
@pytest.mark.parametrize(
    ("key", "value"), [("what", np.array(["a"])), ("what", [1, [2.5]]), (3, 1.0)]
)
def test_state_must_be_arrays_of_numbers_by_name(key, value):
    class Remember(LossWeighting):
        def update(self, epoch, logs):
            self.state[key] = value

    rule = Remember(NAMES)
    found = re.escape(f"`Remember.update` after epoch 1: found {value!r} in `state[{key!r}]`.")
    with pytest.raises(ValueError, match=found):
        rule.step({"easy": 1.0, "hard": 1.0})
    assert rule.state == {}


# What it remembers.


MEMORY = {
    "float64": np.array([0.1, np.nan, -0.0, 5e-324]),
    "none yet": np.empty((0, 2), dtype="float32"),
    "complex/with a path": np.array(1 + 2j),
    "": np.array(2**62),
}


class Remember(LossWeighting):
    def update(self, epoch, logs):
        self.state.update(MEMORY)
        return {"easy": 1 / 3, "hard": 0.0}


@one_backend
@pytest.mark.parametrize("way", ["file", "pickle"])
def test_state_and_factors_are_restored_bit_for_bit(tmp_path, way):
    model, rule = dict_model(), Remember(NAMES)
    train(model, rule, epochs=1)
    if way == "pickle":
        resumed = pickle.loads(pickle.dumps(rule))
    else:
        model.save_weights(tmp_path / "file.weights.h5")
        # The same outputs in another order, and a rule that uses the state of its base class.
        resumed = type("RememberMore", (Remember,), {})(NAMES[::-1])
        resumed.set_model(other := compiled(dict_model(), resumed))
        other.load_weights(tmp_path / "file.weights.h5")
    assert resumed.factors == rule.factors == {"easy": 1 / 3, "hard": 0.0}
    assert list(resumed.state) == list(MEMORY)
    for name, value in MEMORY.items():
        np.testing.assert_array_equal(resumed.state[name], value, strict=True)
    resumed.reset()
    assert (resumed.state, resumed.factors) == ({}, {"easy": 1.0, "hard": 1.0})


@one_backend
def test_rule_continues_with_another_ones_factors_but_not_its_state(dwa, tmp_path):
    model = dict_model()
    train(model, Count(NAMES), epochs=2)
    model.save_weights(tmp_path / "file.weights.h5")
    dwa.set_model(compiled(model, dwa))
    model.load_weights(tmp_path / "file.weights.h5")
    assert dwa.state == {}
    history = fit(model, dwa, initial_epoch=2, epochs=4)
    assert history["easy_weight"] == [0.5, 0.5]
    assert sum(dwa.factors.values()) == pytest.approx(2)


@one_backend
def test_rule_is_shown_by_its_name_outputs_and_current_weights():
    assert repr(Count({"easy": 2.0})) == "Count({'easy': 2.0}, weights={'easy': 2.0})"
    dwa = DynamicWeightAverage(NAMES)
    move(dwa)
    shown = "(['easy', 'hard'], temperature=2.0, weights={'easy': 0.9376, 'hard': 1.062})"
    assert repr(dwa) == f"DynamicWeightAverage{shown}"
