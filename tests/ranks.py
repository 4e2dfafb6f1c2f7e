"""Processes that train together, for tests to start."""

import json
import os
import pickle
import socket

import keras
import numpy as np
from common import BACKEND
from processes import FORK

DEVICES = 4


def start(function, ranks, folder, *args):
    """Starts `function(rank, ranks, *args)` in `ranks` processes; pickles what it returns."""
    folder.mkdir(exist_ok=True)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(ranks)]
    addresses = ["127.0.0.1:{1}".format(*free.getsockname()) for free in sockets]
    for free in sockets:
        free.close()
    arguments = [(rank, addresses, folder, function, args) for rank in range(ranks)]
    processes = [FORK.Process(target=_run, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes):
    """How the processes ended: None for one that hangs."""
    for process in processes:
        process.join(timeout=120)
    return [process.exitcode for process in processes]


def run(function, ranks, folder, *args):
    """What `function(rank, ranks, *args)` returns in each of `ranks` processes."""
    assert exit_codes(start(function, ranks, folder, *args)) == [0] * ranks
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]


def check_same(found, expected, rtol=1e-5):
    """Asserts that `found` has all that `expected` has by name."""
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol, atol=rtol / 100, err_msg=key)


def _run(rank, addresses, folder, function, args):
    ranks = len(addresses)
    if BACKEND == "torch":
        import torch

        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://{addresses[0]}", rank=rank, world_size=ranks
        )
    elif BACKEND == "jax":
        flag = f"--xla_force_host_platform_device_count={DEVICES // ranks}"
        os.environ["XLA_FLAGS"] = flag
        keras.distribution.initialize(addresses[0], ranks, rank)
    else:
        task = {"type": "worker", "index": rank}
        cluster = {"cluster": {"worker": addresses}, "task": task}
        os.environ["TF_CONFIG"] = json.dumps(cluster)
    returned = function(rank, ranks, *args)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(returned))
    if BACKEND == "torch":
        torch.distributed.destroy_process_group()
