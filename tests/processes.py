"""New processes, forked from one that has already imported the slowest modules."""

import multiprocessing

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["keras", "sklearn.datasets"])


def succeeds(function, *args):
    """Whether a function returns when called in a new process."""
    process = FORK.Process(target=function, args=args, daemon=True)
    process.start()
    process.join()
    return process.exitcode == 0
