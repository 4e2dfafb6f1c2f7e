"""torch's `DistributedDataParallel`: processes that each have a share of every batch."""

import os
import shutil
import signal

import keras
import numpy as np
import pytest
import ranks
from common import BACKEND, LOSSES, NAMES, X, Y, compiled, dict_model
from ranks import check_same

from keras_dwa import CompoundLoss, DynamicWeightAverage

pytestmark = [pytest.mark.skipif(BACKEND != "torch", reason="ranks are torch's"), pytest.mark.deep]

if BACKEND == "torch":
    import torch
    from torch.nn.parallel import DistributedDataParallel

# The last batch of an epoch has 5 samples, of which 3 ranks get 2, 2 and 1.
SAMPLES = 37


def batches(rank, ranks):
    """The samples of each global batch, and which of them a rank has."""
    for start in range(0, SAMPLES, 8):
        batch = np.arange(SAMPLES)[start : start + 8]
        yield batch, np.array_split(batch, ranks)[rank]


def train(rank, ranks, folder=None, kill_at=None):
    """Trains by gradients over the samples of all ranks; returns the weights and the parameters.

    Continues from what rank 0 wrote into `folder`. In epoch 2, a target of the last rank is NaN,
    and no rank takes the steps that this spoils. At the epoch and batch `kill_at`, the last rank is
    killed.
    """
    keras.utils.set_random_seed(0)
    model = dict_model()
    dwa = DynamicWeightAverage(NAMES, temperature=0.2)
    model.compound = CompoundLoss(LOSSES, dwa)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.8)
    files = sorted(folder.glob("*.weights.h5")) if folder else []
    if files:
        model.load_weights(files[-1])
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
    forward = DistributedDataParallel(model) if ranks > 1 else model
    weights = []
    for epoch in range(len(files), 5):
        for number, (batch, mine) in enumerate(batches(rank, ranks)):
            if (epoch, number) == kill_at and rank == ranks - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            y = {name: target[mine] for name, target in Y.items()}
            if epoch == 2 and rank == ranks - 1:
                y["hard"] = np.where(mine[:, np.newaxis] == batch[-1], np.nan, y["hard"])
            loss = model.compound(y, forward(X[mine], training=True))
            optimizer.zero_grad()
            # DDP averages the gradients over ranks. This turns it into an average over samples.
            (loss * len(mine) * ranks / len(batch)).backward()
            if all(parameter.grad.isfinite().all() for parameter in model.parameters()):
                optimizer.step()
        weights.append(list(dwa.step().values()))
        if folder and rank == 0:
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            model.save_weights(folder / f"{epoch}.weights.h5")
    parameters = np.concatenate([parameter.ravel() for parameter in model.get_weights()])
    return {"weights": weights, "parameters": parameters}


@pytest.mark.filterwarnings("ignore:DynamicWeightAverage holds")
def test_all_ranks_have_the_weights_of_one_process_also_after_a_nan(tmp_path):
    found, expected = ranks.run(train, 3, tmp_path), train(0, 1)
    for of_rank in found:
        check_same(of_rank, expected)
        assert of_rank["weights"] == found[0]["weights"]
    held = np.diff(expected["weights"], axis=0)[:, 0] == 0
    assert held.tolist() == [False, True, False, False]


def test_killed_run_resumes_on_as_many_ranks_and_on_others(tmp_path):
    whole, *_ = ranks.run(train, 2, tmp_path / "whole")
    expected = {"weights": whole["weights"][3:], "parameters": whole["parameters"]}
    folder = tmp_path / "killed"
    killed = ranks.start(train, 2, folder, folder, (3, 2))
    # In the other process, gloo reports that the connection was lost.
    assert ranks.exit_codes(killed) == [1, -signal.SIGKILL]
    for size in (1, 2):
        copy = shutil.copytree(folder, tmp_path / f"{size}")
        for resumed in ranks.run(train, size, copy, copy):
            check_same(resumed, expected, rtol=0 if size == 2 else 1e-5)


def message_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except RuntimeError as error:
        return str(error)


def steps(rank, ranks):
    """The errors of each way in which ranks can differ, and the resulting factors."""
    found = {}
    dwa = DynamicWeightAverage(NAMES)
    compound = CompoundLoss(NAMES, dwa)
    ones, given = {"easy": 1.0, "hard": 1.0}, {"easy": 1.0, "hard": 1.0 + rank}
    dwa.step()  # No rank recorded anything.
    if rank == 0:
        compound.combine(ones)
    found["nothing"] = message_of(dwa.step)
    dwa.reset()
    dwa.step(ones)
    if rank == 0:
        dwa.reset()
    found["epochs"] = message_of(dwa.step, ones)
    dwa.reset()
    found["step"] = message_of(dwa.step, given)
    found["adapt"] = message_of(dwa.adapt, given)
    if rank == 0:
        compound.combine(ones)
    found["two ways"] = message_of(dwa.step, *([given] if rank else []))
    for hard in (1.0, np.nan, 3.0):
        dwa.step({"easy": 1.0, "hard": hard})
    found["equal"] = dwa.factors
    dwa.step(given, all_ranks=False)
    compound.combine({"easy": 1.0, "hard": 1.0 + 2 * rank})
    dwa.step(all_ranks=False)
    found["apart"] = dwa.factors
    found["factors"] = message_of(dwa.step, ones)
    found["order"] = message_of(DynamicWeightAverage(NAMES[:: -1 if rank else 1]).step, ones)
    many, found["many"] = DynamicWeightAverage([str(k) for k in range(40)]), []
    for all_ranks, least in ((True, 0.1), (False, 0.1 + rank)):
        many.adapt({name: least + int(name) for name in many.outputs}, all_ranks=all_ranks)
        found["many"].append(dict(many.base_weights))
    return found


@pytest.mark.filterwarnings("ignore:DynamicWeightAverage holds")
def test_each_rank_says_what_differs(tmp_path):
    found = ranks.run(steps, 2, tmp_path)
    averages = "averages of the losses differ between ranks. Found [1.0, 1.0] on rank 0, [1.0, 2.0]"
    expected = {
        "nothing": "Nothing was recorded on ranks [1] of 2.",
        "epochs": "Found [1.0, 1.0, 0.0] on rank 0, [1.0, 1.0, 1.0] on rank 1. Use the same",
        "step": averages,
        "adapt": averages,
        "factors": "weights of ['easy', 'hard'] or the numbers of past epochs or windows differ",
        "order": "Found [['easy', 'hard'], ['hard', 'easy']], by rank",
    }
    for messages in found:
        for way, message in expected.items():
            assert message in messages[way]
        assert messages["two ways"] is not None
        assert messages["equal"] == found[0]["equal"] != {"easy": 1.0, "hard": 1.0}
    assert found[1]["many"][0] == found[0]["many"][0] == found[0]["many"][1]
    assert found[0]["apart"] == {"easy": 1.0, "hard": 1.0} != found[1]["apart"]


def adapted(rank, ranks):
    """The base weights from unequal shares of the data."""
    keras.utils.set_random_seed(0)
    dwa = DynamicWeightAverage(NAMES)
    rows = np.arange(len(X)) if ranks == 1 else np.split(np.arange(len(X)), [24])[rank]
    y = {name: target[rows] for name, target in Y.items()}
    dwa.adapt(compiled(dict_model(), dwa), X[rows], y, batch_size=8)
    return dict(dwa.base_weights)


def test_ranks_adapt_to_the_losses_of_all_of_them(tmp_path):
    first, second = ranks.run(adapted, 2, tmp_path)
    check_same(first, adapted(0, 1))
    assert first == second


def communication(rank, ranks):
    """The number of all-reduces in a step with static weights, one with live ones, and `step`."""
    dwa = DynamicWeightAverage(NAMES)
    compound = CompoundLoss(LOSSES, dwa)
    model = DistributedDataParallel(dict_model())

    def static(y_true, y_pred):
        return sum((y_pred[name] - torch.as_tensor(y_true[name])).abs().mean() for name in NAMES)

    def step(loss):
        loss(Y, model(X, training=True)).backward()

    counts = []
    for function in (lambda: step(static), lambda: step(compound), dwa.step):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            function()
        counts.append(sum(event.name == "c10d::allreduce_" for event in profile.events()))
    return counts


def test_step_communicates_nothing_more_and_an_epoch_one_all_reduce(tmp_path):
    assert ranks.run(communication, 2, tmp_path) == [[1, 1, 1]] * 2


def callback_list(rank, ranks, update_freq, members):
    """Calls callbacks as `fit` does, on ranks that share a model, for four epochs.

    Returns the history, the windows, and, for `update_freq="epoch"`, the error of a fifth epoch, in
    which rank 1 has no batch.
    """
    group = torch.distributed.new_group(members)
    if rank not in members:
        return None
    model = dict_model()
    dwa = DynamicWeightAverage(NAMES, temperature=0.2, update_freq=update_freq)
    model.compound = CompoundLoss(NAMES, dwa)
    parallel = DistributedDataParallel(model, process_group=group)
    history = keras.callbacks.History()
    callbacks = keras.callbacks.CallbackList([dwa, history], model=parallel)
    # For each epoch and sample.
    losses = np.random.default_rng(0).uniform(1, 2, size=(5, SAMPLES, 2))
    callbacks.on_train_begin()
    for epoch in range(5 if update_freq == "epoch" else 4):
        callbacks.on_epoch_begin(epoch)
        for number, (_, mine) in enumerate(batches(rank, len(members))):
            if (epoch, rank) == (4, 1):
                break
            callbacks.on_train_batch_begin(number)
            terms = dict(zip(NAMES, losses[epoch, mine].mean(0), strict=True))
            model.compound.combine(terms, samples=len(mine))
            callbacks.on_train_batch_end(number)
        easy, hard = losses[epoch].mean(0)
        error = message_of(callbacks.on_epoch_end, epoch, {"easy_loss": easy, "hard_loss": hard})
    weights = {key: values[:4] for key, values in history.history.items()}
    return weights, [list(window.weights.values()) for window in dwa.windows], error


@pytest.mark.parametrize("update_freq", ["epoch", 3])
def test_callback_takes_the_model_that_ddp_wraps_on_some_ranks(update_freq, tmp_path):
    *found, outsider = ranks.run(callback_list, 3, tmp_path, update_freq, (0, 1))
    ((expected, windows, _),) = ranks.run(callback_list, 1, tmp_path, update_freq, (0,))
    assert outsider is None
    for history, of_rank, error in found:
        assert (history, of_rank) == found[0][:2]
        check_same(history, expected)
        np.testing.assert_allclose(of_rank, windows, rtol=1e-5)
        if update_freq == "epoch":
            assert " on rank 0, [nan, nan] on rank 1. Pass averages" in error
        else:
            assert error is None
            assert len(of_rank) == 6
