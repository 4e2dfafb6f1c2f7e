"""Processes that train together, for tests to start: each function here runs in every one of them."""

import json
import os
import pickle
import signal
import socket

import keras
import numpy as np
from common import BACKEND, LOSSES, X, Y, dict_model
from processes import FORK

from keras_dwa import CompoundLoss, DynamicWeightAverage

DEVICES = 4


def start(function, ranks, folder, *args):
    """Starts `function(rank, ranks, *args)` in so many processes; what it returns is pickled."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [(rank, ranks, port, folder, function, args) for rank in range(ranks)]
    processes = [FORK.Process(target=_run, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    return processes


def run(function, ranks, folder, *args):
    """What `function(rank, ranks, *args)` returned in each of so many processes."""
    for process in (processes := start(function, ranks, folder, *args)):
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]


def _run(rank, ranks, port, folder, function, args):
    address = f"127.0.0.1:{port}"
    if BACKEND == "torch":
        import torch

        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://{address}", rank=rank, world_size=ranks
        )
    elif BACKEND == "jax":
        flag = f"--xla_force_host_platform_device_count={DEVICES // ranks}"
        os.environ["XLA_FLAGS"] = flag
        keras.distribution.initialize(address, ranks, rank)
    returned = function(rank, ranks, *args)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(returned))
    if BACKEND == "torch":
        torch.distributed.destroy_process_group()
