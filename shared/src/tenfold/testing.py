"""Assertions that many test suites use."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pytest
    from numpy.typing import NDArray
    from torch import Tensor, nn


def assert_same_as_reference(actual: "Tensor", reference: "Tensor", *, relative: float) -> None:
    """||actual - reference|| <= relative * ||reference||, in fp64; the message gives the ratio that was found."""
    import torch

    assert actual.shape == reference.shape, f"shape {tuple(actual.shape)}, the reference has {tuple(reference.shape)}"
    a, b = actual.detach().to(torch.float64), reference.detach().to(torch.float64)
    scale = float(b.norm())
    error = float((a - b).norm()) / (scale if scale else 1.0)
    assert math.isfinite(error), "NaN or infinity in the result or in the reference"
    assert error <= relative, f"relative error {error:.3g}, allowed {relative:.3g}"


def assert_gradient_isolated(loss: "Tensor", *, reaches: Iterable["Tensor"], spares: Iterable["Tensor"]) -> None:
    """The gradient of ``loss`` is non-zero on each tensor of ``reaches`` and absent or zero on each of ``spares``."""
    import torch

    reached, spared = list(reaches), list(spares)
    grads = torch.autograd.grad(loss, [*reached, *spared], allow_unused=True, retain_graph=True)
    for index, grad in enumerate(grads[: len(reached)]):
        assert grad is not None, f"no gradient path to tensor {index} of those that it should reach"
        assert bool(grad.any()), f"zero gradient on tensor {index} of those that it should reach"
    for index, grad in enumerate(grads[len(reached) :]):
        assert grad is None or not bool(grad.any()), f"a gradient leaks to tensor {index} of those that it should spare"


def assert_saved_and_loaded_equal(module: "nn.Module", fresh: "nn.Module", path: Path, *inputs: "Tensor") -> None:
    """A module saved to ``path`` and loaded into ``fresh`` gives the same outputs, bit for bit."""
    import torch

    from tenfold import checkpoints

    checkpoints.save(path, module.state_dict(), method="test", config={})
    checkpoints.load_into(fresh, path, method="test")
    module.eval()
    fresh.eval()
    with torch.no_grad():
        assert torch.equal(module(*inputs), fresh(*inputs)), "outputs differ after saving and loading"


def assert_user_error(
    main: Callable[[Sequence[str]], int],
    argv: Sequence[str],
    capsys: "pytest.CaptureFixture[str]",
    *expected: str,
) -> str:
    """``main(argv)`` exits with 2 and one line on stderr, ``<dist>: error: ...``, that holds all of ``expected``."""
    capsys.readouterr()
    code = main(argv)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert code == 2, f"exit code {code}, stderr: {captured.err}"
    assert len(lines) == 1, f"{len(lines)} lines on stderr: {captured.err}"
    assert ": error: " in lines[0], lines[0]
    for part in expected:
        assert part in lines[0], f"{part!r} is not in: {lines[0]}"
    return lines[0]


def write_cifar(
    folder: Path, monkeypatch: "pytest.MonkeyPatch", *, kind: str = "CIFAR-100", classes: int = 100, each: int = 2
) -> "dict[str, tuple[NDArray[np.uint8], list[int]]]":
    """Write random images in the published form of CIFAR and let them pass for the published files during a test.

    Args:
        folder: folder to write to; it is made.
        monkeypatch: pytest's; it changes the checksums of ``tenfold.readers`` until the test ends.
        kind: ``"CIFAR-10"`` or ``"CIFAR-100"``.
        classes: number of classes.
        each: images per class in each file.

    Returns:
        Rows (N, 3072) and labels of each file of images.
    """
    import hashlib
    import pickle

    import numpy as np

    from tenfold import readers

    files = readers.CIFAR_FILES[kind]
    rng, folder = np.random.default_rng(0), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    labels = [index % classes for index in range(classes * each)]
    images = {name: rng.integers(0, 256, (len(labels), 3072)).astype(np.uint8) for name in (*files.train, files.test)}
    contents: dict[str, dict[str, object]] = {
        name: {"data": rows, files.labels: labels} for name, rows in images.items()
    }
    contents[files.meta] = {files.names: [f"class {index}" for index in range(classes)]}
    for name, content in contents.items():
        raw = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(raw)
        monkeypatch.setitem(readers.CIFAR_MD5, name, hashlib.md5(raw, usedforsecurity=False).hexdigest())
    return {name: (rows, labels) for name, rows in images.items()}
