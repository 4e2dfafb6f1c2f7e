"""The weights enter the step that `fit` runs, and move there."""

import itertools

import keras
import numpy as np
import pytest
from common import (
    BACKEND,
    LOSSES,
    MODES,
    SAMPLES,
    Lambda,
    X,
    Y,
    check_base_loss,
    check_run,
    fit,
    heads,
    train,
)

from keras_dwa import DynamicWeightAverage


# On torch, compiling a step takes half a minute, and the next test does so too.
@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(mode, marks=pytest.mark.deep if (BACKEND, mode) == ("torch", "jit") else ())
        for mode in MODES
    ],
)
def test_parameters_move_by_the_weighted_gradient(mode):
    inputs = keras.Input((4,))
    features = keras.layers.Dense(3, use_bias=False, name="trunk")(inputs)
    outputs = {
        name: keras.layers.Dense(units, use_bias=False, name=name)(features)
        for name, units in {"easy": 1, "hard": 2}.items()
    }
    model = keras.Model(inputs, outputs)
    kernels = []

    def add_kernels(epoch, logs):
        kernels.append([np.float64(kernel) for kernel in look.model.get_weights()])

    look = Lambda(on_epoch_begin=add_kernels)
    dwa = DynamicWeightAverage(["easy", "hard"], temperature=0.05)
    how = {"loss": {"easy": "mse", "hard": "mse"}, "optimizer": keras.optimizers.SGD(0.1)}
    fit = {"batch_size": SAMPLES, "epochs": 5, "others": [look]}
    history = train(model, dwa, mode=MODES[mode], **how, **fit)

    for epoch, (old, new) in enumerate(itertools.pairwise(kernels)):
        trunk, *head_kernels = old
        trunk_gradient = np.zeros_like(trunk)
        for name, head, new_head in zip(("easy", "hard"), head_kernels, new[1:], strict=True):
            # d/dhead and d/dtrunk of weight * mean((x @ trunk @ head - y) ** 2)
            error = X @ trunk @ head - Y[name]
            error_gradient = history[f"{name}_weight"][epoch] * 2 * error / error.size
            trunk_gradient += X.T @ error_gradient @ head.T
            head_gradient = (X @ trunk).T @ error_gradient
            np.testing.assert_allclose(new_head - head, -0.1 * head_gradient, atol=1e-6)
        np.testing.assert_allclose(new[0] - trunk, -0.1 * trunk_gradient, atol=1e-6)
    check_run(history, dwa)
    assert abs(history["easy_weight"][3] - 1) > 0.01


# Windows also close at the ends of epochs. On torch, compiling a step takes half a minute.
@pytest.mark.parametrize("update_freq", [2] if BACKEND == "torch" else ["epoch", 2])
def test_step_is_compiled_as_often_as_with_static_weights(update_freq, compilation_counter):
    if keras.__version__.startswith("3.10.") and update_freq != "epoch":
        pytest.skip("Keras 3.10 compiles once more for what is assigned within an epoch first")
    layer, count = compilation_counter

    def compilations(dwa=None):
        """How often the layer was compiled by the end of each epoch."""
        inputs, outputs = heads()
        model = keras.Model(inputs, {name: layer(output) for name, output in outputs.items()})
        weights = dwa.loss_weights if dwa else {"easy": 1.0, "hard": 2.0}
        jit = {"jit_compile": True} if BACKEND == "torch" else {}
        model.compile("sgd", LOSSES, loss_weights=weights, **jit)
        before, counts = count(), []
        at_end = Lambda(on_epoch_end=lambda epoch, logs: counts.append(count() - before))
        callbacks = [dwa, at_end] if dwa else [at_end]
        split = 0.0 if BACKEND == "torch" else 0.2
        fit(model, *callbacks, epochs=2, validation_split=split)
        history = fit(model, *callbacks, validation_split=split)
        if dwa:
            # Its weights moved and reached the loss, or the values above would be wrong.
            assert dwa.factors["easy"] != 1
            check_base_loss(history, dwa.base_weights)
        return counts

    if BACKEND == "jax":
        # Small functions that a process compiles once, and those that read the sums of windows.
        compilations(DynamicWeightAverage(["easy", "hard"], 0.2, update_freq))
    moving = compilations(DynamicWeightAverage(["easy", "hard"], 0.2, update_freq))
    assert moving[0] > 0
    assert moving == (moving[:1] * 5 if BACKEND == "torch" else compilations())


@pytest.fixture
def compilation_counter():
    """A layer for the model, and a function that returns how often it was compiled so far."""
    if BACKEND == "tensorflow":
        traces = []

        class CountTraces(keras.layers.Layer):
            def call(self, inputs):
                traces.append(1)
                return inputs

        yield CountTraces(), lambda: len(traces)
    elif BACKEND == "jax":
        from jax import monitoring

        compiled = []

        def listen(event, _seconds, **_):
            if event == "/jax/core/compile/backend_compile_duration":
                compiled.append(event)

        monitoring.register_event_duration_secs_listener(listen)
        yield keras.layers.Identity(), lambda: len(compiled)
        # Old versions of JAX lack it.
        if hasattr(monitoring, "unregister_event_duration_listener"):
            monitoring.unregister_event_duration_listener(listen)
    else:
        from torch._dynamo.utils import counters

        yield keras.layers.Identity(), lambda: counters["stats"]["unique_graphs"]
