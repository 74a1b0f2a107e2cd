"""From a base model and calibration text to a wrapped model, against peft: memory, each way in its own process, and accuracy.

The computation is that of ``end_to_end.py``. Memory is the peak resident size of a process that goes the whole way once, less
that of one that imports the same and only makes model and windows, both counted from there on, with an allocator that
returns what is free (``ALLOCATOR``, for both). The last rows show the error of the adapted subspace; the reference is an SVD
in fp64 of W C_d, C summed in fp64. No row is a time, so the machine need not be idle.
"""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from corda import collect_context
from corda.adapters import lora_layers
from end_to_end import MODELS, PEERS, RANK, asked, model_of, shape_of, whole, windows

from tenfold import bench

ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def memory_rows(size: str) -> list[bench.Comparison]:
    """Extra peak memory of the whole way."""
    return [
        bench.resident(
            f"memory_{way}_{mode}_{size}",
            _command(way, mode, size),
            _command("peft", mode, size),
            _command("nothing", mode, size),
            shape=shape_of(size),
            required=required,
            equal="the computation of the time rows",
            runs=1,
            environment=ALLOCATOR,
        )
        for mode in ("ipm", "kpm")
        for way, required in (("hooks", ">= 4"), ("streamed", ">= 10"))
    ]


def _command(way: str, mode: str, size: str) -> list[str]:
    return [sys.executable, __file__, "--once", way, mode, size]


def once(way: str, mode: str, size: str) -> None:
    """Go one way once; what reading the model took for a while does not count (on Linux, which can forget a peak)."""
    model, data = model_of(size), windows(size)
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5", encoding="ascii")
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
            bench.counted(
                f"subspace_error_{mode}_{size}",
                lost["streamed"],
                lost["peft"],
                shape=shape_of(size),
                unit="",
                statistic="mean of 1 - cos^2 to the subspace of an SVD in fp64",
                required=">= 1",
                equal="B of both, orthonormalized",
                ratio=ratio,
            )
        )
    return rows


def measure(sizes: Sequence[str]) -> list[bench.Comparison]:
    """All rows."""
    return [row for size in sizes for row in memory_rows(size)] + (error_rows("1024") if "1024" in sizes else [])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        once(*sys.argv[2:])
    else:
        chosen = asked(list(MODELS))
        raise SystemExit(bench.main("corda", PEERS, lambda: measure(chosen)))
