"""From a base model and calibration text to a wrapped model, against peft: memory, in a process each, and accuracy.

The computation is that of ``end_to_end.py``. Memory is the peak resident size of a process that goes the whole way once, less
that of one that imports the same and makes model and windows only, with an allocator that returns what is free
(``ALLOCATOR``, for both). The last rows show the error of the adapted subspace; the
reference is an SVD in fp64 of W C_d, C summed in fp64. No row is a time: the machine need not be idle.
"""

import copy
import sys

import torch
from corda import collect_context
from corda.adapters import lora_layers
from end_to_end import MODELS, PEERS, RANK, model_of, shape_of, whole, windows

from tenfold import bench
from tenfold.claims import Bound

ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def memory_rows(size: str) -> list[bench.Comparison]:
    """Extra peak memory of the whole way."""
    rows = []
    idle = _peak("nothing", "kpm", size)
    for mode in ("ipm", "kpm"):
        theirs = _peak("peft", mode, size) - idle
        for way, required in (("hooks", ">= 4"), ("streamed", ">= 10")):
            ours = _peak(way, mode, size) - idle
            rows.append(
                bench.Comparison(
                    id=f"memory_{way}_{mode}_{size}",
                    shape=shape_of(size),
                    ours=ours,
                    peer=theirs,
                    unit="MB",
                    statistic="peak resident size of a process each, less one that makes the model only",
                    ratio=theirs / ours,
                    ci95=None,
                    required=required,
                    holds=Bound.parse(required).decide(theirs / ours, None),
                    equal="the computation of the time rows",
                )
            )
    return rows


def _peak(way: str, mode: str, size: str) -> float:
    """MB of a process of its own."""
    return bench.peak_rss([sys.executable, __file__, "--once", way, mode, size], ALLOCATOR)


def once(way: str, mode: str, size: str) -> None:
    """Go one way once."""
    model, data = model_of(size), windows()
    if way != "nothing":
        whole(way, mode, model, data)


def error_rows(size: str) -> list[bench.Comparison]:
    """How far the adapted subspaces are from those of an SVD in fp64: mean of 1 - cos^2 over all layers and directions."""
    rows = []
    model, data = model_of(size), windows()
    double = collect_context(copy.deepcopy(model).double(), data)
    for mode in ("ipm", "kpm"):
        wrapped = {way: whole(way, mode, copy.deepcopy(model), data) for way in ("streamed", "peft")}
        lost = dict.fromkeys(wrapped, 0.0)
        bases = {way: lora_layers(model) for way, model in wrapped.items()}
        for name in double.targets:
            W, C = model.get_submodule(name).weight.detach().double(), double.covariance(name)
            M = W @ C + 0.01 * C.diagonal().mean() * W
            U = torch.linalg.svd(M, full_matrices=False).U
            U = U[:, :RANK] if mode == "ipm" else U[:, -RANK:]
            for way, layers in bases.items():
                Q = torch.linalg.qr(layers[name].lora_B["default"].weight.detach().double()).Q
                lost[way] += (1 - (U.T @ Q).square().sum() / RANK).item() / len(double.targets)
        ratio = lost["peft"] / max(lost["streamed"], 1e-16)
        rows.append(
            bench.Comparison(
                id=f"subspace_error_{mode}_{size}",
                shape=shape_of(size),
                ours=lost["streamed"],
                peer=lost["peft"],
                unit="",
                statistic="mean of 1 - cos^2 to the subspace of an SVD in fp64",
                ratio=ratio,
                ci95=None,
                required=">= 1",
                holds=ratio >= 1,
                equal="B of both, orthonormalized",
            )
        )
    return rows


def measure() -> list[bench.Comparison]:
    """All rows."""
    return [row for size in MODELS for row in memory_rows(size)] + error_rows("1024")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        once(*sys.argv[2:])
    else:
        raise SystemExit(bench.main("corda", PEERS, measure))
