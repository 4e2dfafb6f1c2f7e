"""Which model a weighting is attached to."""

import weakref
from typing import Any

import keras

from keras_dwa._compiled import is_compiled_with
from keras_dwa._windows import WindowedRule
from keras_dwa._wiring import RETURN_MESSAGE, attach, check_model, check_once, is_tracked


class AttachedRule(WindowedRule):
    """A rule whose weights are those of one model at a time: it starts afresh with each new one."""

    # Whether no epoch has begun since it started afresh.
    _is_new = False
    # torch's `DistributedDataParallel`, if the model was given in that: in a loop of one's own.
    _wrapper: Any = None

    def reset(self) -> None:
        super().reset()
        self._is_new = False

    def set_params(self, params: dict[str, Any]) -> None:
        check_once(params, self)
        super().set_params(params)

    def set_model(self, model: keras.Model) -> None:
        weights = self._weights
        plain = keras.callbacks.Callback()
        plain.set_model(model)
        # What torch's `DistributedDataParallel` wraps, where that is given.
        wrapper, model = model, plain.model
        check_model(model, weights, in_fit=False)
        self._wrapper = None if wrapper is model else wrapper
        # With a compound loss, the weights may enter through the model's own step instead.
        weights.in_logs = weights.record is not None and not is_compiled_with(model, weights)
        former, is_known = self.model, self._knows(model)
        if is_known and model is former and is_tracked(model, weights):
            return
        attach(model, weights)
        is_unpickled = former is None and bool(weights.file)
        if not is_unpickled:
            assigned = self._assigned
            self.reset()
            if assigned:
                self.assign(assigned)
        self._is_new = True
        self._models.append(weakref.ref(model))
        # Late, so that the next call does it all again if Ctrl-C comes before.
        super().set_model(model)
        if is_known and model is not former:
            self._messages.append(RETURN_MESSAGE)
            self._warn()
