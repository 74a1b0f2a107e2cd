"""A trained module as a file for elsewhere: safetensors, torch.export or ONNX with a free batch size.

What was written is read back and run before the file appears, so a file that is there gives what the module gives.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tenfold.errors import UserError, needs
from tenfold.modules import evaluating
from tenfold.randomness import generator
from tenfold.runs import Run

Format = Literal["safetensors", "torch-export", "onnx"]
SUFFIXES: Mapping[Format, str] = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}
"""Suffix of the file of each format."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        difference: largest difference of its outputs from the module's, relative to the largest output; 0 for safetensors,
            whose tensors are equal.
        tensors: number of tensors of the module.
        bytes: size of the file.
    """

    path: Path
    difference: float
    tensors: int
    bytes: int


def save(
    module: nn.Module,
    example: Tensor | Sequence[Tensor],
    run: Run,
    name: str,
    format: Format = "safetensors",
    *,
    inputs: Sequence[str] = ("images",),
    outputs: Sequence[str] = ("logits",),
    batch_sizes: Sequence[int] = (1, 3),
    tolerance: float = 1e-4,
) -> Exported:
    """Write a module into a run folder, in evaluation mode, and compare what was written with the module.

    Args:
        module: takes tensors whose first dimension is the batch, and gives one or several such tensors.
        example: inputs of the module; their other dimensions are fixed in the file, the first is free. The comparison repeats
            their rows; constant inputs of real numbers are replaced by normal noise, which tells more.
        run: the run folder.
        name: name of the file without its suffix.
        format: ``safetensors`` has the weights alone, under the module's own names; ``torch-export`` is read by
            ``torch.export.load``, ``onnx`` by ONNX runtimes.
        inputs: names of the inputs in ONNX.
        outputs: names of the outputs in ONNX.
        batch_sizes: batch sizes that the outputs are compared at.
        tolerance: largest difference that is accepted, relative to the largest output.

    Raises:
        UserError: the module cannot be traced, or the outputs differ; the file is then not there.
        MissingExtraError: ONNX is not installed.
    """
    examples = (example,) if isinstance(example, Tensor) else tuple(example)
    file = f"{name}{SUFFIXES[format]}"
    shown = f"{run.path / file}: {format}"
    if format == "onnx":
        for library in ("onnx", "onnxscript", "onnxruntime"):
            needs(library, "onnx", why="--format onnx")
    with evaluating(module), run.replacing(file) as temporary:
        difference = 0.0
        if format == "safetensors":
            _save_weights(module, temporary)
        else:
            call = (_save_program if format == "torch-export" else _save_onnx)(
                module, _batch(examples, 2), temporary, shown, inputs, outputs
            )
            difference = max(_difference(module, call, _batch(examples, size)) for size in batch_sizes)
            if not difference <= tolerance:
                raise UserError(
                    f"{shown} gives outputs that differ from the module's by {difference:.3g} of the largest,"
                    f" more than {tolerance:.3g}: take another format"
                )
    size = (run.path / file).stat().st_size
    return Exported(run.path / file, difference, len(module.state_dict()), size)


def _batch(examples: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
    """Inputs of a batch size: the rows of the example again and again."""
    found = []
    for number, example in enumerate(examples):
        rows = example[torch.arange(size, device=example.device) % len(example)]
        if rows.is_floating_point() and bool((rows == rows.flatten()[0]).all()):
            rows = torch.randn(rows.shape, generator=generator(number, size)).to(rows)
        found.append(rows)
    return tuple(found)


def _difference(module: nn.Module, call: Callable[..., Any], batch: Sequence[Tensor]) -> float:
    """Largest difference of the outputs, relative to the largest output of the module; NaN where shapes or NaN differ."""
    ours, theirs = tree_leaves(module(*batch)), tree_leaves(call(*batch))
    if [tuple(x.shape) for x in ours] != [tuple(x.shape) for x in theirs]:
        return float("nan")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach().double().cpu(), b.detach().double().cpu()
        found = float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) if a.numel() else 0.0
        if found != found:  # NaN stays, whatever comes after it
            return found
        worst = max(worst, found)
    return worst


def _save_weights(module: nn.Module, path: Path) -> None:
    from safetensors.torch import load_file, save_file

    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    save_file(own, path, metadata={"format": "pt"})
    written = load_file(path)
    assert all(torch.equal(written[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in own.items())


def _save_program(
    module: nn.Module,
    batch: tuple[Tensor, ...],
    path: Path,
    shown: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> Callable[..., Any]:
    torch.export.save(_traced(module, batch, shown), path)
    program: Callable[..., Any] = torch.export.load(path).module()
    return program


def _traced(module: nn.Module, batch: tuple[Tensor, ...], shown: str) -> torch.export.ExportedProgram:
    """The module as a graph in which the batch size is free."""
    free = torch.export.Dim("batch", min=1, max=65535)
    try:
        return torch.export.export(module, batch, dynamic_shapes=tuple({0: free} for _ in batch))
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, LookupError) as error:
        # what torch.export raises for control flow that depends on values, and for a batch size that is not free
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{shown} needs a module that torch.export can trace ({reason}); safetensors needs none"
        ) from error


def _save_onnx(
    module: nn.Module,
    batch: tuple[Tensor, ...],
    path: Path,
    shown: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> Callable[..., Any]:
    import onnx
    import onnxruntime

    traced = _traced(module, batch, shown)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries among themselves
        program = torch.onnx.export(
            traced, (), input_names=list(inputs), output_names=list(outputs), dynamo=True, verbose=False
        )
    assert program is not None
    onnx.checker.check_model(program.model_proto)
    path.write_bytes(program.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def call(*tensors: Tensor) -> list[Tensor]:
        fed = {name: tensor.detach().cpu().numpy() for name, tensor in zip(inputs, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, fed)]

    return call
