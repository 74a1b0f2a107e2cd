"""Dense algebra of the solvers: SciPy's in fp64 on the CPU, torch's elsewhere.

SciPy's OpenBLAS is two to five times as fast as torch's MKL on an AMD processor, and it computes only the eigenvectors that
are asked for. Matrices are 2-D tensors throughout; those that a function overwrites are named in its docstring.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from tenfold import NonFiniteError

STRIP = 256
"""Rows of a matrix that are worked on at a time where a second copy of all of it would cost too much memory."""


def finite(matrix: Tensor, name: str) -> Tensor:
    """``matrix``, checked through its sum, which NaN and infinity reach and finite values do not overflow.

    Raises:
        NonFiniteError: NaN or infinity.
    """
    if not torch.isfinite(matrix.sum(dtype=torch.float32 if matrix.element_size() < 4 else None)):
        raise NonFiniteError(f"the {name} holds NaN or infinity")
    return matrix


@contextlib.contextmanager
def matmul_precision(*, tf32: bool) -> Iterator[None]:
    """Within, say whether products of fp32 matrices may round their factors to TF32; the user's settings and autocast wait.

    TF32 holds values of bf16 and fp16 exactly, those of fp32 to 1e-3.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", *([accelerator.type] if accelerator else [])}
    with contextlib.ExitStack() as contexts:
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                contexts.enter_context(torch.autocast(kind, enabled=False))
        contexts.enter_context(_fp32_precision(tf32))
        yield


@contextlib.contextmanager
def _fp32_precision(tf32: bool) -> Iterator[None]:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    libraries: Any = torch.backends
    backends = [libraries.cuda.matmul, libraries.mkldnn.matmul]
    settings = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        for backend, setting in zip(backends, settings, strict=True):
            backend.fp32_precision = setting


def products_are_full() -> bool:
    """Whether products of fp32 matrices on a CPU are left in fp32 by the user's setting."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    libraries: Any = torch.backends
    return libraries.mkldnn.matmul.fp32_precision not in ("tf32", "bf16")


@contextlib.contextmanager
def scipy_alone() -> Iterator[None]:
    """Within, torch takes one thread and leaves the cores to SciPy.

    Two libraries that take turns hinder each other: after its work, the idle threads of one spin for some ten
    milliseconds while those of the other wait for a core. A solve took half as long again.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def on_cpu(matrix: Tensor) -> bool:
    """Whether a matrix lies in the CPU's memory."""
    return matrix.device.type == "cpu"


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left`` times ``right``."""
    if not on_cpu(left) or left.dtype != torch.float64:
        return left @ right
    pair = [_numpy(left), _numpy(right)]
    turned = [not array.flags.f_contiguous for array in pair]  # such a one is handed over as its transpose, uncopied
    a, b = (array.T if turn else array for array, turn in zip(pair, turned, strict=True))
    return torch.from_numpy(scipy.linalg.blas.dgemm(1.0, a, b, trans_a=turned[0], trans_b=turned[1]))


def upper_factor(matrix: Tensor, *, overwrite: bool = False) -> Tensor:
    """R of a QR decomposition of ``matrix``; with ``overwrite``, computed in its memory."""
    if not on_cpu(matrix):
        return torch.linalg.qr(matrix, mode="r").R
    a, size = _numpy(matrix), matrix.shape[1]
    (geqrt,) = scipy.linalg.get_lapack_funcs(("geqrt",), (a,))  # recursive: twice as fast as geqrf of scipy.linalg.qr
    packed, *_ = geqrt(min(64, size), a, overwrite_a=overwrite)
    return torch.from_numpy(np.triu(packed[:size]))


def gram(matrix: Tensor) -> Tensor:
    """``matrix`` ``matrix``^T; at least its lower triangle is valid."""
    if not on_cpu(matrix):
        return matrix @ matrix.T
    (syrk,) = scipy.linalg.get_blas_funcs(("syrk",), dtype=_numpy(matrix).dtype)
    a = _numpy(matrix)
    upper = syrk(1.0, a.T, trans=1) if a.flags.c_contiguous else syrk(1.0, a)  # either is in Fortran's order: no copy
    return torch.from_numpy(upper.T)


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of a matrix whose lower triangle is valid; computed in its memory.

    Raises:
        LinAlgError: the matrix is not positive definite.
    """
    if not on_cpu(matrix):
        factor, info = torch.linalg.cholesky_ex(matrix)
        if info.item():
            raise np.linalg.LinAlgError("not positive definite")
        return factor
    # in Fortran's order the transpose is at hand, so its upper factor is what costs no copy
    return torch.from_numpy(scipy.linalg.cholesky(_numpy(matrix).T, overwrite_a=True, check_finite=False).T)


def solve_triangular(lower: Tensor, right: Tensor, *, transposed: bool = False) -> Tensor:
    """L^-1 ``right``, or with ``transposed`` L^-T ``right``."""
    if not on_cpu(lower):
        return torch.linalg.solve_triangular(lower.T if transposed else lower, right, upper=transposed)
    trans = "T" if transposed else "N"
    solved = scipy.linalg.solve_triangular(_numpy(lower), _numpy(right), lower=True, trans=trans, check_finite=False)
    return torch.from_numpy(solved)


def inverse_triangular(lower: Tensor) -> Tensor:
    """L^-1 of a lower triangular matrix."""
    if not on_cpu(lower):
        return torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
    (trtri,) = scipy.linalg.get_lapack_funcs(("trtri",), dtype=_numpy(lower).dtype)
    upper = np.tril(_numpy(lower)).T  # a copy, in Fortran's order
    inverse, info = trtri(upper, lower=0, overwrite_c=1)
    assert info == 0, "a triangular factor with a zero on its diagonal"
    return torch.from_numpy(inverse.T)


def inverse_from_cholesky(lower: Tensor) -> Tensor:
    """(L L^T)^-1, computed in the memory of L."""
    if not on_cpu(lower):
        return torch.cholesky_inverse(lower)
    (potri,) = scipy.linalg.get_lapack_funcs(("potri",), dtype=_numpy(lower).dtype)
    inverse, info = potri(_numpy(lower).T, lower=0, overwrite_c=1)
    assert info == 0, "a Cholesky factor with a zero on its diagonal"
    found = torch.from_numpy(inverse.T)
    mirror(found)
    return found


def mirror(matrix: Tensor) -> None:
    """Copy the lower triangle to the upper one, in place."""
    for start in range(0, len(matrix), STRIP):
        end = start + STRIP
        corner = matrix[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        matrix[start:end, end:] = matrix[end:, start:end].T


def leading_eigenpairs(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest eigenvalues, descending, and their eigenvectors, of a matrix with a valid lower triangle.

    The matrix is overwritten.
    """
    if not on_cpu(matrix):
        values, vectors = torch.linalg.eigh(matrix)
    else:
        size = len(matrix)
        chosen = [size - count, size - 1]
        a = _numpy(matrix).T
        pairs = scipy.linalg.eigh(
            a, lower=False, subset_by_index=chosen, driver="evr", overwrite_a=True, check_finite=False
        )
        values, vectors = (torch.from_numpy(part) for part in pairs)
    return values[-count:].flip(0), vectors[:, -count:].flip(1)


def orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span those of ``matrix``."""
    return torch.linalg.qr(matrix).Q


def _numpy(matrix: Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    return matrix.detach().numpy()
