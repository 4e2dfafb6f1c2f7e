"""What the plot of a run shows, for every kind of history."""

import sys

import keras
import numpy as np
import pytest
from common import dict_model, one_backend, train
from numpy import inf, nan

from keras_dwa import DynamicWeightAverage, LossWeighting, plot_history

pytestmark = one_backend

BASE = {"easy": 10.0, "hard": 1.0}


class Frame:
    """As much of a data frame as is needed."""

    def __init__(self, columns):
        self.columns, self._values = list(columns), columns

    def __getitem__(self, column):
        return np.array(self._values[column])


def made_up(*names, epochs=3, **columns):
    """A history of outputs that all learn at the same speed."""
    history = {f"{name}_loss": [1.0 / epoch for epoch in range(1, epochs + 1)] for name in names}
    history |= {f"{name}_weight": [1.0] * epochs for name in names}
    return history | columns


def lines(figure):
    """The lines of each panel: label to epochs or batches, and values."""
    return [{line.get_label(): line.get_data() for line in panel.lines} for panel in figure.axes]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The history of a run that validates every second epoch, its CSV file, its weighting."""
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("logs") / "log.csv"
    model, dwa = dict_model(), DynamicWeightAverage(BASE, 0.2)
    others = [keras.callbacks.CSVLogger(path, separator=";")]
    train(model, dwa, epochs=5, others=others, validation_split=0.2, validation_freq=2)
    return model.history, path, dwa


def test_losses_are_relative_to_the_first_epoch_and_weights_to_the_base_weights(run):
    history, _, dwa = run
    logs = history.history
    total, *outputs = lines(plot_history(history, dwa, validation_freq=2))
    np.testing.assert_equal(total["training"], ([1, 2, 3, 4, 5], logs["base_loss"]))
    np.testing.assert_equal(total["validation"], ([2, 4], logs["val_base_loss"]))
    for name, loss, weight in zip(BASE, outputs[::2], outputs[1::2], strict=True):
        losses, validation = np.array(logs[f"{name}_loss"]), np.array(logs[f"val_{name}_loss"])
        np.testing.assert_equal(loss["training"], ([1, 2, 3, 4, 5], losses / losses[0]))
        np.testing.assert_equal(loss["validation"], ([2, 4], validation / losses[0]))
        factors = np.array(logs[f"{name}_weight"]) / BASE[name]
        np.testing.assert_equal(weight["weight"], ([1, 2, 3, 4, 5], factors))
        assert weight["uniform"][1] == [1, 1]
        assert 1e-3 < np.abs(factors - 1).max() < 1


def test_history_its_dict_a_csv_file_and_a_data_frame_give_the_same_picture(run):
    history, path, _ = run
    expected = lines(plot_history(history, validation_freq=2))
    np.testing.assert_equal(lines(plot_history(history.history, validation_freq=[2, 4])), expected)
    for file in (path, str(path)):
        np.testing.assert_equal(lines(plot_history(file)), expected)
    columns = made_up("a", "b", val_a_loss=[nan, 0.5, nan])
    expected = lines(plot_history(columns))
    np.testing.assert_equal(lines(plot_history(Frame(columns))), expected)


def test_weights_of_windows_are_steps_over_batches():
    dwa = DynamicWeightAverage(BASE, 0.2, update_freq=3)
    figure = plot_history(train(dict_model(), dwa, epochs=2), dwa)
    batches, weights = lines(figure)[3]["weight"]
    np.testing.assert_equal(batches, [0, 3, 6, 9])
    of_windows = [window.weights["easy"] / 10 for window in dwa.windows]
    np.testing.assert_equal(weights, [*of_windows, of_windows[-1]])
    assert len(set(of_windows)) == 2
    assert figure.axes[3].lines[0].get_drawstyle() == "steps-post"
    assert figure.axes[3].get_title() == "weight / base weight"
    assert figure.axes[6].get_xlabel() == "batch (latest 3 windows)"


def test_loss_of_a_single_output_which_keras_logs_weighted_is_unweighted():
    logs = {"loss": [8.0, 0.0, 12.0], "val_loss": [4.0, 0.0, 24.0], "a_weight": [2.0, 0.0, 6.0]}
    loss, weight = lines(plot_history(logs))
    np.testing.assert_equal(loss["training"][1], [1.0, nan, 0.5])
    np.testing.assert_equal(loss["validation"][1], [0.5, 1.0])
    np.testing.assert_equal(weight["weight"][1], [2.0, 0.0, 6.0])


def test_notebook_shows_the_picture_which_pyplot_does_not_know():
    import matplotlib.pyplot
    from IPython.core.formatters import DisplayFormatter

    formatted, _ = DisplayFormatter().format(plot_history(made_up("a", "b")))
    assert formatted["image/png"].startswith(b"\x89PNG")
    assert matplotlib.pyplot.get_fignums() == []


def test_odd_losses_and_weights_leave_the_rest_as_it_is():
    losses = {
        "zero": ([0.0, 4.0, 2.0], [0.0, 1.0, 0.5]),
        "negative": ([-2.0, -3.0, nan], [-1.0, -1.5, nan]),
        "diverged": ([8.0, inf, nan], [1.0, nan, nan]),
        "never": ([nan, inf, -inf], [nan, nan, nan]),
        "done": ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    }
    history = {f"{name}_loss": values for name, (values, _) in losses.items()}
    history |= {f"{name}_weight": [1.0, 0.5, 0.0] for name in losses}
    history["val_never_loss"] = [5.0, 10.0, 5.0]
    figure = plot_history(history)
    figure.draw_without_rendering()
    drawn = dict(zip(losses, lines(figure)[::2], strict=True))
    for name, (_, relative) in losses.items():
        np.testing.assert_equal(drawn[name]["training"][1], relative)
    np.testing.assert_equal(drawn["never"]["validation"][1], [1.0, 2.0, 1.0])
    np.testing.assert_equal(lines(figure)[1]["weight"][1], [1.0, 0.5, 0.0])
    assert figure.axes[1].get_ylim()[0] < 0 < 1 < figure.axes[1].get_ylim()[1]


def test_run_that_ends_in_nan_shows_all_its_epochs():
    assert plot_history(made_up("a", a_loss=[1.0, nan, nan])).axes[0].get_xlim()[1] > 3


@pytest.mark.parametrize(
    ("losses", "scale"), [([4.0, 0.5], "linear"), ([4.0, 0.3], "log"), ([4.0, 0.0], "linear")]
)
def test_axis_of_losses_is_logarithmic_if_that_gives_it_two_ticks(losses, scale):
    figure = plot_history(made_up("a", "b", epochs=2, a_loss=losses))
    assert [panel.get_yscale() for panel in figure.axes[::2]] == [scale] * 2


@pytest.mark.parametrize(("epochs", "shown"), [((0, 1, 0), (1, 2, 3)), ((4, 5, 7), (5, 6, 8))])
def test_epochs_of_a_resumed_run_continue(epochs, shown):
    loss, *_ = lines(plot_history(made_up("a", "b", epoch=epochs)))
    np.testing.assert_equal(loss["training"][0], shown)


def test_weighting_says_which_outputs_and_where_uniform_is():
    names = ["c/$_$", "a"]  # As a formula, this would be an error.
    figure = plot_history(made_up("a", "b", names[0]), LossWeighting(names))
    assert [panel.get_ylabel() for panel in figure.axes[::2]] == names
    figure.draw_without_rendering()
    assert figure.axes[1].lines[1].get_label() == "uniform"
    without = plot_history(made_up("a", "b"))
    assert without.axes[1].lines[1].get_label() == "uniform (base weights 1)"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([made_up("a", epochs=0)], ValueError, r"no epochs. Call `fit` first. Found {'a_loss': \["),
        ([3], TypeError, "`history` must be what `fit` returned.*Found int"),
        ([made_up("a"), []], TypeError, "`weighting` must be the callback.*Found list"),
        ([{"a_weight": [1.0], "b_weight": [1.0], "loss": [1.0]}], ValueError, "of outputs"),
        ([made_up("a"), LossWeighting(["a", "b"])], ValueError, r"losses of \['a', 'b'\]"),
        ([made_up("a", a_loss=[1.0])], ValueError, "`a_loss` has 1 values.* 3 epochs"),
        ([made_up("a", val_a_loss=[1.0])], ValueError, "validation_freq`.*Found `.*_freq = 1`"),
    ],
)
def test_bad_input_is_an_error_that_says_what_to_give(arguments, error, message):
    with pytest.raises(error, match=message):
        plot_history(*arguments)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "keras_dwa._drawing", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="needs matplotlib: pip install matplotlib"):
        plot_history(made_up("a", "b"))


def test_weights_that_move_by_a_percent_look_like_it():
    figure = plot_history(made_up("a", "b", a_weight=[1.0, 1.01, 0.99]))
    low, high = figure.axes[1].get_ylim()
    assert high - low >= 0.2
