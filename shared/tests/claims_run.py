"""Measurements that other processes are sent: of a module that they can import, as a package's are."""

import os

import numpy as np
import torch

from tenfold.claims import Measured


def scaled(factor, seed):
    values = {"top1": factor * (seed + 1.0), "pid": float(os.getpid()), "threads": float(torch.get_num_threads())}
    return Measured(values, {"history": np.arange(seed + 2) * factor})


def broken_at_1(seed):
    if seed == 1:
        raise ZeroDivisionError
    return {"top1": 1.0}
