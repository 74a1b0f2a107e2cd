"""The selective scan, forward and backward, against the textbook, mambapy and the loop of transformers' slow mixer.

The textbook is a literal one: exp(delta A) and delta u B over the whole sequence in one tensor each, one state per step,
autograd behind it. mambapy is its parallel scan ``pscan`` on the same tensors. The loop of transformers' mixer is written
here as that library has it (one exponential over all steps, a product of matrices per step); its module holds projections,
which are not compared. Sessions are compared on maps of the miniImageNet preset's kind at a tenth of its width: with the
frozen part kept or not, and against a literal form of the authors' step, which calls the block once per path, the textbook's
scan within, keeps nothing, and reads its maps again in each pass.
"""

import copy
import dataclasses
import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from mamba_fscil.blocks import PATHS, MambaBlock, scan_order
from mamba_fscil.config import ProjectorConfig, SessionConfig
from mamba_fscil.head import dot_regression_loss, simplex_etf
from mamba_fscil.losses import ClassSensitiveLoss
from mamba_fscil.projector import BranchOutput, DualSSMProjector, SelectiveBranch
from mamba_fscil.scan import _SCRATCH, selective_scan
from mamba_fscil.session import SessionRows, learn, learning_rate, parameter_groups
from mambapy.pscan import pscan
from safetensors.torch import load_file, save_file
from torch import Tensor

from tenfold import bench
from tenfold.memory import MemoryProbe

Scan = Callable[..., Tensor]
SHAPES = {
    "CIFAR-100": (16, 640, 256, 4),
    "miniImageNet": (4, 512, 256, 25),
    "long": (1, 256, 16, 2048),
    "demonstration": (128, 48, 8, 16),
}
"""Rows, channels, states, tokens."""


def ours(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Our scan."""
    y = selective_scan(u, delta, A, B, C)
    assert isinstance(y, Tensor)
    return y


def _whole(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and inputs of all steps, (b, L, D, N)."""
    decay = torch.exp(delta.transpose(1, 2)[..., None] * A)
    return decay, (delta * u).transpose(1, 2)[..., None] * B.transpose(1, 2)[:, :, None]


def textbook(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One step after another; steps are taken apart at once, since indexing each would cost a whole gradient per step."""
    decay, x = _whole(u, delta, A, B)
    h, ys = torch.zeros_like(x[:, 0]), []
    for a, b, c in zip(decay.unbind(1), x.unbind(1), C.unbind(2), strict=True):
        h = a * h + b
        ys.append((h * c[:, None]).sum(dim=-1))
    return torch.stack(ys, dim=2)


def mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """mambapy's parallel scan."""
    h = pscan(*_whole(u, delta, A, B))
    return (h @ C.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)


def transformers_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The loop of transformers' slow mixer."""
    decay = torch.exp(A[None, :, None, :] * delta[:, :, :, None])
    x = delta[:, :, :, None] * B.transpose(1, 2)[:, None] * u[:, :, :, None]
    h, ys = torch.zeros_like(x[:, :, 0]), []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + x[:, :, t]
        ys.append((h @ C[:, :, t, None])[..., 0])
    return torch.stack(ys, dim=-1)


def inputs(name: str) -> list[Tensor]:
    """Inputs of a shape."""
    b, d, n, length = SHAPES[name]
    g = torch.Generator().manual_seed(0)
    found = [
        torch.randn(b, d, length, generator=g),
        F.softplus(torch.randn(b, d, length, generator=g) - 3),
        -torch.arange(1.0, n + 1).repeat(d, 1),
        torch.randn(b, n, length, generator=g),
        torch.randn(b, n, length, generator=g),
    ]
    return [x.requires_grad_() for x in found]


def gradients(scan: Scan, given: Sequence[Tensor]) -> list[Tensor]:
    """Forward and backward."""
    return list(torch.autograd.grad(scan(*given).square().sum(), list(given)))


def agreement(a: Sequence[Tensor], b: Sequence[Tensor]) -> str:
    """Whether all gradients are the same."""
    worst = max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))
    assert worst < 1e-3, worst
    return f"gradients differ by {worst:.1g}"


def time_row(id: str, peer: Scan, name: str, required: str) -> bench.Comparison:
    """Seconds of forward and backward."""
    given = inputs(name)
    shape = "b={}, D={}, N={}, L={}".format(*SHAPES[name])
    return bench.compare(
        f"{id}, {name}", lambda: gradients(ours, given), lambda: gradients(peer, given), agreement,
        shape=shape, required=required, pairs=21,
    )  # fmt: skip


def peak(scan: Scan, given: Sequence[Tensor]) -> float:
    """MiB of tensors beyond the inputs, at the worst moment; kept scratch is dropped before, so that it counts."""
    vars(_SCRATCH).clear()
    with MemoryProbe(list(given)) as probe:
        gradients(scan, given)
    return (probe.peak_bytes - probe.start_bytes) / 2**20


def memory_row(name: str) -> bench.Comparison:
    """Peak of memory against the textbook."""
    given = inputs(name)
    equal = agreement(gradients(ours, given), gradients(textbook, given))
    return bench.counted(
        f"memory, textbook, {name}", peak(ours, given), peak(textbook, given),
        shape="b={}, D={}, N={}, L={}".format(*SHAPES[name]), unit="MiB", required=">= 10", equal=equal,
        statistic="peak of tensors beyond the inputs, forward and backward",
    )  # fmt: skip


CONFIG = ProjectorConfig(width=64, states=32, rank=32)
SESSION = SessionConfig(steps=5, batch_size=64, mix=0.0)


def _problem() -> tuple[DualSSMProjector, Tensor, SessionRows]:
    torch.manual_seed(0)
    projector = DualSSMProjector(64, (5, 5), CONFIG)
    projector.add_incremental_branch()
    maps, labels = torch.randn(85, 64, 5, 5), torch.cat([torch.arange(60), torch.arange(60, 65).repeat(5)])
    return (
        projector,
        simplex_etf(64, 64, torch.Generator().manual_seed(0)),
        SessionRows(maps, labels % 64, torch.ones(85, dtype=torch.int64)),
    )


def session(cache: bool) -> list[Tensor]:
    """One session; the branch after it."""
    projector, W, rows = copy.deepcopy(_PROBLEM)
    learn(projector, W, rows, dataclasses.replace(SESSION, cache=cache), base_classes=60, session=1)
    assert projector.inc is not None
    return [p.detach() for p in projector.inc.parameters()]


_PROBLEM = _problem()


def session_rows() -> list[bench.Comparison]:
    """Sessions with the frozen part kept, against the same without, and against the authors' step."""

    def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> str:
        worst = max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
        assert worst < 1e-5, worst
        return f"the branch differs by {worst:.1g} at most"

    shape = "85 rows of 64x5x5, 5 steps of 64"
    with tempfile.TemporaryDirectory() as name:
        save_file({"maps": _PROBLEM[2].maps}, Path(name) / "maps.safetensors")
        return [
            bench.compare(
                "session, frozen part not kept", lambda: session(True), lambda: session(False), equal,
                shape=shape, required=">= 2", pairs=7,
            ),
            bench.compare(
                "session, authors' step", lambda: session(True), lambda: literal_session(Path(name)), equal,
                shape=shape, required=">= 4", pairs=7,
            ),
        ]  # fmt: skip


def _literal_branch(branch: SelectiveBranch, maps: Tensor) -> BranchOutput:
    """A branch with one call of the block per path, all of it computed again."""
    tokens = branch.mlp_proj(maps).flatten(2).transpose(1, 2) + branch.pos_embed
    block = branch.block
    assert isinstance(block, MambaBlock)
    y, gate, params = torch.zeros(()), torch.zeros(()), []
    for path in PATHS:
        order = scan_order(path, branch.size)
        x, z = block.in_proj(tokens[:, order]).chunk(2, dim=-1)
        x = F.silu(block.conv1d(x.transpose(1, 2))[..., : len(order)]).transpose(1, 2)
        low, B, C = torch.split(block.x_proj(x), [block.rank, block.states, block.states], dim=-1)
        delta = F.softplus(block.dt_proj(low))
        found = textbook(
            *(v.transpose(1, 2) for v in (x, delta)), -torch.exp(block.A_log), *(v.transpose(1, 2) for v in (B, C))
        )
        out = (found.transpose(1, 2) + block.D * x) * F.silu(z)
        back = order.argsort()
        y, gate = y + out[:, back], gate + z[:, back]
        params = params or [low.mean(dim=1), B.mean(dim=1), C.mean(dim=1)]
    return BranchOutput(y.mean(dim=1), gate, (params[0], params[1], params[2]))


def literal_session(folder: Path) -> list[Tensor]:
    """The same session as the authors' code makes it; the branch after it."""
    projector, W, rows = copy.deepcopy(_PROBLEM)
    inc, base = projector.inc, projector.base
    assert isinstance(inc, SelectiveBranch)
    assert isinstance(base, SelectiveBranch)
    projector.freeze_base()
    optimizer = torch.optim.SGD(parameter_groups(projector, SESSION), lr=SESSION.lr, momentum=SESSION.momentum)
    losses = ClassSensitiveLoss(SESSION.suppression_base, SESSION.suppression_novel, SESSION.separation)
    for step, index in enumerate(rows.batches(SESSION.batch_size, SESSION.steps, 0, 1), 1):
        maps, labels = load_file(folder / "maps.safetensors")["maps"][index], rows.labels[index]
        frozen = projector.residual(maps.mean(dim=(2, 3))) + _literal_branch(base, maps).mu
        out = _literal_branch(inc, maps)
        assert out.gate is not None
        assert out.params is not None
        loss = dot_regression_loss(frozen.detach() + out.mu, W, labels, balanced=SESSION.balanced)
        loss = loss + losses(out.gate, out.params, labels, 60).total
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(list(inc.parameters()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, SESSION.steps, SESSION.lr * group["scale"])
        optimizer.step()
    return [p.detach() for p in inc.parameters()]


def measure() -> list[bench.Comparison]:
    """All rows."""
    rows = []
    for name in ("CIFAR-100", "miniImageNet"):
        rows += [time_row("time, textbook", textbook, name, ">= 5"), time_row("time, mambapy", mambapy, name, ">= 3")]
        rows.append(memory_row(name))
    rows.append(time_row("time, loop of transformers", transformers_loop, "CIFAR-100", ">= 5"))
    rows += [time_row("time, textbook", textbook, "long", ">= 1"), time_row("time, mambapy", mambapy, "long", ">= 1")]
    rows.append(time_row("time, textbook", textbook, "demonstration", ">= 1"))
    return rows + session_rows()


if __name__ == "__main__":
    PEERS = {"mambapy": importlib.metadata.version("mambapy"), "textbook": "literal", "transformers' loop": "literal"}
    sys.exit(bench.main("mamba-fscil", PEERS, measure))
