"""Blocks around the selective scan: Mamba over sequences, SS2D over maps, both along several paths through a map.

Legend of shapes: b batch, d model width, D inner width, H x W map, L = H W tokens, K paths, N states, R rank of delta.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_fscil.scan import selective_scan

Path = Literal["row", "row-reversed", "column", "column-reversed"]
PATHS: tuple[Path, ...] = get_args(Path)
"""The four paths through a map, in the order of the authors' code."""
VMAMBA_PATHS: tuple[Path, ...] = ("row", "column", "row-reversed", "column-reversed")
"""The same in the order of VMamba, for its weights."""


class BlockOutput(NamedTuple):
    """What a block gives over the tokens of a map.

    Attributes:
        tokens: (b, L, D), gated, summed over the paths, in row-major order.
        gate: (b, L, D), what the gate was before its SiLU, times the number of paths that it acted on.
        params: mean over the tokens of the low-rank delta (b, R), of B (b, N) and of C (b, N).
    """

    tokens: Tensor
    gate: Tensor
    params: tuple[Tensor, Tensor, Tensor]


def scan_order(path: Path, size: tuple[int, int]) -> Tensor:
    """Row-major index of the token at each place of a path, (L,).

    Args:
        path: the path.
        size: height and width of the map.
    """
    places = torch.arange(size[0] * size[1]).view(size)
    flat = (places.t() if path.startswith("column") else places).flatten()
    return flat.flip(0) if path.endswith("reversed") else flat.clone()


def along(tokens: Tensor, path: Path, size: tuple[int, int]) -> Tensor:
    """The tokens of a map in the order of a path: ``tokens[:, scan_order(path, size)]``, by turning the map.

    Args:
        tokens: (b, H W, D), row-major.
        path: the path.
        size: height and width of the map.
    """
    if path.startswith("column"):
        tokens = tokens.reshape(-1, *size, tokens.shape[-1]).transpose(1, 2).flatten(1, 2)
    return tokens.flip(1) if path.endswith("reversed") else tokens


def back(tokens: Tensor, path: Path, size: tuple[int, int]) -> Tensor:
    """The tokens of a path in row-major order: what ``along`` undoes.

    Args:
        tokens: (b, H W, D), in the order of the path.
        path: the path.
        size: height and width of the map.
    """
    if path.endswith("reversed"):
        tokens = tokens.flip(1)
    if path.startswith("column"):
        tokens = tokens.reshape(-1, size[1], size[0], tokens.shape[-1]).transpose(1, 2).flatten(1, 2)
    return tokens


def initial_delta(inner: int, rank: int, copies: int | None = None) -> tuple[Tensor, Tensor]:
    """Weight (D, R) and bias (D,) that make delta log-uniform in [1e-3, 1e-1]; several of them in one tensor for ``copies``.

    Source: Mamba, arXiv 2312.00752, section 3.6, with the floor of 1e-4 and the bounds of its code.
    """
    shape = () if copies is None else (copies,)
    weight = torch.empty(*shape, inner, rank).uniform_(-(rank**-0.5), rank**-0.5)
    low, high = math.log(1e-3), math.log(1e-1)
    step = torch.exp(torch.rand(*shape, inner) * (high - low) + low).clamp_min(1e-4)
    return weight, step + torch.log(-torch.expm1(-step))


def initial_log_decay(inner: int, states: int) -> Tensor:
    """log(1..N) for each channel, (D, N).

    Source: Mamba, arXiv 2312.00752, section 3.6 (S4D-Real).
    """
    return torch.arange(1, states + 1, dtype=torch.float32).log().repeat(inner, 1)


class _Causal(torch.autograd.Function):
    """A causal convolution of each channel, (b, L, D): one product per tap, in place; libraries are slow at it on a CPU."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, weight_DK: Tensor, bias: Tensor) -> Tensor:
        # the newest first, side by side: products along strided weights take three times as long
        taps_KD = weight_DK.t().flip(0).contiguous()
        ctx.save_for_backward(x_BLD, taps_KD)
        y_BLD = torch.addcmul(bias, x_BLD, taps_KD[0])
        for back in range(1, min(len(taps_KD), x_BLD.shape[1])):
            y_BLD[:, back:].addcmul_(x_BLD[:, :-back], taps_KD[back])
        return y_BLD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BLD, taps_KD = ctx.saved_tensors
        length = x_BLD.shape[1]
        dx_BLD, dtaps_KD = dy_BLD * taps_KD[0], torch.zeros_like(taps_KD)
        for back in range(1, min(len(taps_KD), length)):
            dx_BLD[:, :-back].addcmul_(dy_BLD[:, back:], taps_KD[back])
        for back in range(min(len(taps_KD), length)):
            dtaps_KD[back] = (dy_BLD[:, back:] * x_BLD[:, : length - back]).sum(dim=(0, 1))
        return dx_BLD, dtaps_KD.flip(0).t(), dy_BLD.sum(dim=(0, 1))


def _causal(x_BLD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A causal convolution of each channel, (b, L, D), whose weight is (D, 1, K)."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        taps, length = weight.shape[-1], x_BLD.shape[1]
        padded = F.pad(x_BLD, (0, 0, taps - 1, 0))
        parts = [padded[:, tap : tap + length] * weight[:, 0, tap] for tap in range(taps)]
        return torch.stack(parts).sum(dim=0) + bias
    y_BLD: Tensor = _Causal.apply(x_BLD, weight[:, 0], bias)
    return y_BLD


class MambaBlock(nn.Module):
    """A Mamba block, over a sequence or over several paths through a map, with the parameter names of mamba-ssm.

    Its weights load by name, with those of mamba-ssm's ``Mamba`` and of the mixers of transformers and mambapy.

    Args:
        width: width d of the tokens.
        states: states N per channel.
        conv: width of the causal convolution.
        expand: inner width D over d.
        rank: rank R of delta; default: d / 16, rounded up.
        out_proj: whether a last projection maps D back to d. The method has none; mamba-ssm's blocks have.

    Raises:
        ValueError: from ``forward``, for tokens of another shape.

    Source: Mamba, arXiv 2312.00752, section 3.4; the paths of Mamba-FSCIL, arXiv 2407.06136, share all weights.

    Example:
        >>> MambaBlock(8, states=4)(torch.randn(2, 7, 8)).shape
        torch.Size([2, 7, 8])
    """

    def __init__(
        self,
        width: int,
        states: int = 16,
        conv: int = 4,
        expand: int = 1,
        rank: int | None = None,
        *,
        out_proj: bool = False,
    ) -> None:
        super().__init__()
        self.inner, self.states, self.rank = expand * width, states, rank or -(-width // 16)
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=False)
        self.conv1d = nn.Conv1d(self.inner, self.inner, conv, groups=self.inner, padding=conv - 1)
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.inner)
        weight, bias = initial_delta(self.inner, self.rank)
        self.dt_proj.weight.data, self.dt_proj.bias.data = weight, bias
        self.A_log = nn.Parameter(initial_log_decay(self.inner, states))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, width, bias=False) if out_proj else None

    def forward(self, tokens: Tensor) -> Tensor:
        """The block over a sequence, as mamba-ssm has it.

        Shapes: ``tokens`` (b, L, d) -> (b, L, D), or (b, L, d) with an output projection.

        Raises:
            ValueError: tokens of another width.
        """
        if tokens.ndim != 3 or tokens.shape[-1] != self.in_proj.in_features:
            raise ValueError(f"tokens must be (b, L, {self.in_proj.in_features}), got {tuple(tokens.shape)}")
        x_BLD, z_BLD = self.in_proj(tokens).chunk(2, dim=-1)
        y_BLD = self._scan(x_BLD)[0] * F.silu(z_BLD)
        return y_BLD if self.out_proj is None else self.out_proj(y_BLD)

    def over_map(self, tokens: Tensor, size: tuple[int, int], paths: Sequence[Path] = PATHS) -> BlockOutput:
        """The block along several paths through a map: one projection, since that is pointwise, and one scan for all paths.

        Shapes: ``tokens`` (b, H W, d), row-major -> see ``BlockOutput``; ``params`` are those of the first path.
        """
        x_BLD, z_BLD = self.in_proj(tokens).chunk(2, dim=-1)
        first = tokens.shape[0]
        y, params = self._scan(torch.cat([along(x_BLD, path, size) for path in paths]))
        parts = y.view(len(paths), first, *y.shape[1:]).unbind(0)
        y_BLD = torch.stack([back(part, path, size) for part, path in zip(parts, paths, strict=True)]).sum(dim=0)
        means = (params[0][:first].mean(dim=1), params[1][:first].mean(dim=1), params[2][:first].mean(dim=1))
        return BlockOutput(y_BLD * F.silu(z_BLD), len(paths) * z_BLD, means)

    def _scan(self, x_BLD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Convolution and scan; also the low-rank delta, B and C of each token."""
        assert self.conv1d.bias is not None
        x_BLD = F.silu(_causal(x_BLD, self.conv1d.weight, self.conv1d.bias))
        low_BLR, B_BLN, C_BLN = torch.split(self.x_proj(x_BLD), [self.rank, self.states, self.states], dim=-1)
        y_BDL = selective_scan(
            x_BLD.transpose(1, 2),
            F.linear(low_BLR, self.dt_proj.weight).transpose(1, 2),
            -torch.exp(self.A_log.float()),
            B_BLN.transpose(1, 2),
            C_BLN.transpose(1, 2),
            self.D.float(),
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
        )
        assert isinstance(y_BDL, Tensor)
        return y_BDL.transpose(1, 2), (low_BLR, B_BLN, C_BLN)


class SS2D(nn.Module):
    """A selective scan over a map along several paths with parameters of their own, with the names of VMamba.

    Args:
        width: width d of the tokens.
        states: states N per channel.
        conv: side of the depthwise convolution.
        expand: inner width D over d.
        rank: rank R of delta; default: d / 16, rounded up.
        paths: paths through the map, in the order of the parameters; ``VMAMBA_PATHS`` for weights of VMamba.
        out_proj: whether a last projection maps D back to d. The method has none; VMamba's blocks have.

    Source: VMamba, arXiv 2401.10166, section 4.3; used by Mamba-FSCIL, arXiv 2407.06136, on CUB-200.

    Example:
        >>> SS2D(8, states=4)(torch.randn(2, 4, 3, 8)).shape
        torch.Size([2, 4, 3, 8])
    """

    def __init__(
        self,
        width: int,
        states: int = 16,
        conv: int = 3,
        expand: int = 1,
        rank: int | None = None,
        *,
        paths: Sequence[Path] = PATHS,
        out_proj: bool = False,
    ) -> None:
        super().__init__()
        inner, k = expand * width, len(paths)
        self.inner, self.states, self.rank, self.paths = inner, states, rank or -(-width // 16), tuple(paths)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, conv, groups=inner, padding=conv // 2)
        rows = self.rank + 2 * states
        bound = inner**-0.5  # as nn.Linear has it
        self.x_proj_weight = nn.Parameter(torch.empty(k, rows, inner).uniform_(-bound, bound))
        weight, bias = initial_delta(inner, self.rank, k)
        self.dt_projs_weight, self.dt_projs_bias = nn.Parameter(weight), nn.Parameter(bias)
        self.A_logs = nn.Parameter(initial_log_decay(k * inner, states))
        self.Ds = nn.Parameter(torch.ones(k * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False) if out_proj else None

    def forward(self, maps: Tensor) -> Tensor:
        """The block over maps whose channels come last, as VMamba has it.

        Shapes: ``maps`` (b, H, W, d) -> (b, H, W, D), or (b, H, W, d) with an output projection.
        """
        b, h, w, _ = maps.shape
        y = self.over_map(maps.flatten(1, 2), (h, w)).tokens.view(b, h, w, -1)
        return y if self.out_proj is None else self.out_proj(y)

    def over_map(self, tokens: Tensor, size: tuple[int, int]) -> BlockOutput:
        """The block over the tokens of a map.

        Shapes: ``tokens`` (b, H W, d), row-major -> see ``BlockOutput``; ``params`` are means over all paths.
        """
        b, length, _ = tokens.shape
        k = len(self.paths)
        x_BLD, z_BLD = self.in_proj(tokens).chunk(2, dim=-1)
        x_BDHW = F.silu(self.conv2d(x_BLD.transpose(1, 2).reshape(b, self.inner, *size)))
        x_BDL = x_BDHW.flatten(2)
        orders = [scan_order(path, size).to(tokens.device) for path in self.paths]
        along = torch.stack([x_BDL[..., order] for order in orders], dim=1)  # (b, K, D, L)
        rows = torch.einsum("bkdl,kcd->bkcl", along, self.x_proj_weight)
        low, B, C = torch.split(rows, [self.rank, self.states, self.states], dim=2)
        delta = torch.einsum("bkrl,kdr->bkdl", low, self.dt_projs_weight)
        y = selective_scan(
            along.reshape(b, -1, length),
            delta.reshape(b, -1, length),
            -torch.exp(self.A_logs.float()),
            B.contiguous(),
            C.contiguous(),
            self.Ds.float(),
            delta_bias=self.dt_projs_bias.float().flatten(),
            delta_softplus=True,
        )
        assert isinstance(y, Tensor)
        parts = y.view(b, k, self.inner, length).unbind(dim=1)
        back = [part[..., order.argsort()] for part, order in zip(parts, orders, strict=True)]
        y_BLD = self.out_norm(torch.stack(back).sum(dim=0).transpose(1, 2))
        params = (low.mean(dim=(1, 3)), B.mean(dim=(1, 3)), C.mean(dim=(1, 3)))
        return BlockOutput(y_BLD * F.silu(z_BLD), z_BLD, params)
