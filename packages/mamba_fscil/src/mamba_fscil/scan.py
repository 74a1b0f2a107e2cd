"""The selective scan in plain torch: blocks that stay in the cache, a backward pass that recomputes, chunks for long sequences.

Nothing of size (batch, channels, length, state) is ever stored. The work is cut into blocks of some rows and channels; their
decays and states are computed for up to 64 steps at once in scratch used again, and the backward pass saves the inputs
alone. Chunks of a longer sequence are rows of their own once their first states are known. Products run along the channels.

Shapes: b batch, G groups of channels that share B and C, D channels, N states per channel, L length, S chunks,
T steps of a chunk, r rows and c channels of a block.
"""

import importlib.util
import math
import threading
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.errors import MissingExtraError

Backend = Literal["auto", "torch", "reference", "mamba_ssm"]
CHUNK = 64
"""Steps that a block holds at once."""
BLOCK = 2**20
"""Elements (steps x rows x channels x states) of one of the three tensors of scratch: 4 MiB in single precision."""
PARALLEL = 2**16
"""States of all rows (b x D x N) below which the chunks of a long sequence are computed side by side."""
FEWEST = 8
"""States that a block has at least, where there are so many."""
MATRIX = 4096
"""States x channels from which sums over one of them are products of a row with a matrix, which cost more to begin."""
LARGE = 2**15
"""States x channels from which sums over steps are made step by step."""
INSTALL = 'MAMBA_KEEP_CUDA_BUILD=TRUE pip install "mamba-fscil[cuda]" --no-build-isolation'


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    backend: Backend = "auto",
    block: int | None = None,
    chunk: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The output of a selective state space model, by channel.

        a_t = exp(delta_t A),   h_t = a_t h_{t-1} + delta_t u_t B_t,   y_t = <C_t, h_t> + D u_t,   out = y SiLU(z)

    with the state of zeros, or a given one, before the first step. It is differentiable in all tensors, once.

    Args:
        u: inputs.
        delta: step sizes.
        A: decays, none of which is positive.
        B: how an input enters the state.
        C: how the state is read.
        D: weight of the input in the output.
        z: gate.
        delta_bias: added to ``delta`` per channel.
        delta_softplus: take softplus(delta + bias) as the step size.
        return_last_state: give the state after the last step, too.
        initial_state: state before the first step.
        backend: ``torch`` is ours; ``reference`` one step after another, slow, for tests and for tracing;
            ``mamba_ssm`` the CUDA kernels of that library; ``auto`` takes those where they import and the inputs fit.
        block: elements of a block; changes nothing but speed and memory.
        chunk: steps of a chunk, likewise.

    Shapes: ``u``, ``delta``, ``z`` (b, D, L); ``A`` (D, N); ``B``, ``C`` (D, N), (b, N, L) or (b, G, N, L) where G divides D;
    ``D``, ``delta_bias`` (D,); ``initial_state`` (b, D, N) -> (b, D, L) in the dtype of ``u``, and the last state (b, D, N).

    Raises:
        ValueError: shapes that do not fit each other, a positive decay, or inputs that ``mamba_ssm`` does not take.
        TypeError: a complex tensor.
        MissingExtraError: ``mamba_ssm`` is asked for and not installed.

    Source: Mamba, arXiv 2312.00752, Algorithm 2; B by Euler's rule and A exactly, as in its code. Blocks and chunks are ours.

    Example:
        >>> selective_scan(torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.zeros(1, 1), *torch.ones(2, 1, 1, 2))
        tensor([[[1., 2.]]])
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    tracing = torch.compiler.is_compiling() or torch.compiler.is_exporting()
    if backend == "mamba_ssm" or (backend == "auto" and u.is_cuda and not tracing):
        kernel = _kernel(u, A, initial_state, asked=backend == "mamba_ssm")
        if kernel is not None:
            found: Tensor | tuple[Tensor, Tensor] = kernel(
                u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
            )
            return found
    compute = torch.promote_types(u.dtype, torch.float32)
    steps = delta.to(compute)
    if delta_bias is not None:
        steps = steps + delta_bias.to(compute)[:, None]
    if delta_softplus:
        steps = F.softplus(steps)
    x, decay = u.to(compute), A.to(compute)
    write, read = _grouped(B.to(compute), u.shape), _grouped(C.to(compute), u.shape)
    state = None if initial_state is None else initial_state.to(compute)
    if backend == "reference" or tracing:
        y, last = _one_by_one(x, steps, decay, write, read, state)
    else:
        if not bool((A <= 0).all()):
            worst = float(A.max())
            raise ValueError(f"A must not be positive, since the state would explode; its largest entry is {worst:.3g}")
        with torch.autocast(u.device.type, enabled=False):
            y, last = _Scan.apply(
                x, steps, decay, write, read, state, block or BLOCK, chunk or CHUNK, return_last_state
            )
    if D is not None:
        y = y + D.to(compute)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(compute))
    return (y.to(u.dtype), last) if return_last_state else y.to(u.dtype)


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same as ``selective_scan``, one step after another with autograd's backward pass.

    Shapes: as for ``selective_scan``.

    Raises:
        ValueError: shapes that do not fit each other.
        TypeError: a complex tensor.

    Source: Mamba, arXiv 2312.00752, Algorithm 2.
    """
    return selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state,
        initial_state=initial_state, backend="reference",
    )  # fmt: skip


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    for name, tensor in {**given, "initial_state": initial_state}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must hold real floating-point numbers, got {tensor.dtype}")
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(f"u must be (b, D, L) and A (D, N), got {tuple(u.shape)} and {tuple(A.shape)}")
    b, d, length = u.shape
    n = A.shape[1]
    expected = {
        "delta": (b, d, length), "A": (d, n), "D": (d,), "z": (b, d, length), "delta_bias": (d,),
        "initial_state": (b, d, n),
    }  # fmt: skip
    for name, shape in expected.items():
        tensor = initial_state if name == "initial_state" else given[name]
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} to go with u {tuple(u.shape)}, got {tuple(tensor.shape)}")
    for name, tensor in (("B", B), ("C", C)):
        if tensor.ndim == 2:
            fits = tuple(tensor.shape) == (d, n)
        else:
            fits = tensor.ndim in {3, 4} and (tensor.shape[0], *tensor.shape[-2:]) == (b, n, length)
        if not fits:
            forms = f"({d}, {n}), ({b}, {n}, {length}) or ({b}, G, {n}, {length})"
            raise ValueError(f"{name} must be {forms}, got {tuple(tensor.shape)}")
        if tensor.ndim == 4 and d % tensor.shape[1]:
            raise ValueError(f"{name} has {tensor.shape[1]} groups, which do not divide the {d} channels of u")


def _grouped(x: Tensor, shape: torch.Size) -> Tensor:
    """B or C as (b, G, N, L)."""
    b, d, length = shape
    if x.ndim == 2:
        return x[None, :, :, None].expand(b, d, x.shape[1], length)
    return x[:, None] if x.ndim == 3 else x


def _one_by_one(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, d, length = u.shape
    B, C = (x.repeat_interleave(d // x.shape[1], dim=1) for x in (B, C))
    h = u.new_zeros(b, d, A.shape[1]) if state is None else state
    ys = []
    for t in range(length):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        ys.append((h * C[..., t]).sum(dim=-1))
    return torch.stack(ys, dim=2), h


_WARNED: set[str] = set()


def _kernel(u: Tensor, A: Tensor, initial_state: Tensor | None, *, asked: bool) -> Any:
    """mamba-ssm's function where it can be used; else None, or an error where it was asked for."""
    if importlib.util.find_spec("mamba_ssm") is None:
        if asked:
            raise MissingExtraError(f"backend mamba_ssm needs mamba-ssm, which is not installed: {INSTALL}")
        return None
    reason = ""
    if A.shape[1] > 256:
        reason = f"it takes at most 256 states per channel, got {A.shape[1]}"
    elif initial_state is not None:
        reason = "it takes no initial state"
    elif not u.is_cuda or u.dtype == torch.float64:
        reason = f"it takes float32, float16 and bfloat16 on a GPU, got {u.dtype} on {u.device}"
    if reason:
        if asked:
            raise ValueError(f"backend mamba_ssm: {reason}")
        return None
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except (ImportError, OSError, RuntimeError) as error:
        line = f"mamba-ssm does not import ({str(error).splitlines()[0]}); the scan in plain torch is used: {INSTALL}"
        if asked:
            raise MissingExtraError(line) from error
        if line not in _WARNED:
            _WARNED.add(line)
            warnings.warn(line, stacklevel=3)
        return None
    return selective_scan_fn


class _Scan(torch.autograd.Function):
    """y without D and z, and the last state; saves the inputs and the first state of each chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor | None,
        block: int,
        chunk: int,
        ends: bool,
    ) -> tuple[Tensor, Tensor | None]:
        groups = max(B.shape[1], C.shape[1])
        work = _Work(u, delta, A, B, C, groups, block, chunk)
        firsts = work.first_states(state)
        y, last = work.forward(firsts, ends=ends)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, delta, A, B, C, state if firsts is None or work.chunks == 1 else firsts)
        ctx.how = groups, block, chunk, state is not None
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, state = ctx.saved_tensors
        dy = torch.zeros_like(u) if grads[0] is None else grads[0]
        groups, block, chunk, given = ctx.how
        work = _Work(u, delta, A, B, C, groups, block, chunk)
        firsts = state if state is None or work.chunks > 1 else work.rows_of(state)
        return *work.backward(firsts, dy, grads[1], given=given), None, None, None


class _Span(NamedTuple):
    """Which rows, states and channels make a block."""

    rows: slice
    states: slice
    channels: slice

    def after(self, start: int) -> "_Span":
        """The same of rows that come ``start`` later."""
        return self._replace(rows=slice(self.rows.start + start, self.rows.stop + start))


class _Work:
    """The inputs of one scan cut into chunks and blocks; all tensors are (G, T, S b, ...), contiguous in the last dimension.

    A row is one chunk of one sequence of the batch, chunk by chunk: row k b + i is chunk k of sequence i. States are
    (..., N, c), so that channels come last.
    """

    def __init__(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, groups: int, block: int, chunk: int
    ) -> None:
        self.b, channels, self.length = u.shape
        self.groups, self.c, self.n = groups, channels // groups, A.shape[1]
        self.chunks = max(1, -(-self.length // chunk))
        self.t = -(-self.length // self.chunks)
        self.rows = self.chunks * self.b
        self.block = block
        self.parallel = self.chunks > 1 and self.b * channels * self.n <= PARALLEL
        self.b_groups, self.c_groups = B.shape[1], C.shape[1]
        self.A = A.view(groups, self.c, self.n).transpose(1, 2).contiguous()
        self.A_log2 = self.A * math.log2(math.e)  # powers of 2 take half the time of those of e
        # below this a decay is 0 in every sum; a denormal number would take ten times as long
        lowest = -115.0 if u.dtype == torch.float32 else -1000.0
        self.lowest = lowest if u.numel() and _largest(delta) * _largest(self.A_log2) > -lowest else None
        self.delta = self.cut(delta)
        self.u = self.cut(u)
        self.du = self.delta * self.u
        self.B, self.C = self.cut_states(B), self.cut_states(C)
        self.like: Any = {"dtype": u.dtype, "device": u.device}
        self._scratch = _kept(u)

    def padded(self, x: Tensor) -> Tensor:
        """With zeros behind the end, up to whole chunks."""
        more = self.t * self.chunks - self.length
        return F.pad(x, (0, more)) if more else x

    def cut(self, x: Tensor) -> Tensor:
        """(b, D, L) as (G, T, S b, c); what is added behind the end is 0."""
        x = self.padded(x).reshape(self.b, self.groups, self.c, self.chunks, self.t).permute(1, 4, 3, 0, 2)
        return x.reshape(self.groups, self.t, self.rows, self.c).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """(G, T, S b, c) as (b, D, L), whose channels lie side by side where there is one group."""
        x = x.view(self.groups, self.t, self.chunks, self.b, self.c).permute(3, 0, 4, 2, 1)
        if self.chunks == 1:
            return x.reshape(self.b, self.groups * self.c, self.t)
        return x.reshape(self.b, self.groups * self.c, self.chunks * self.t)[..., : self.length].contiguous()

    def cut_states(self, x: Tensor) -> Tensor:
        """(b, G, N, L) as (G, T, S b, N)."""
        x = x.expand(-1, self.groups, -1, -1) if x.shape[1] == 1 else x.repeat_interleave(self.groups // x.shape[1], 1)
        x = self.padded(x).reshape(self.b, self.groups, self.n, self.chunks, self.t).permute(1, 4, 3, 0, 2)
        return x.reshape(self.groups, self.t, self.rows, self.n).contiguous()

    def join_states(self, x: Tensor, groups: int) -> Tensor:
        """(G, T, S b, N) as (b, G, N, L), summed over what shared one of ``groups``."""
        x = x.view(groups, -1, *x.shape[1:])
        x = x[:, 0] if x.shape[1] == 1 else x.sum(dim=1)
        x = x.view(groups, self.t, self.chunks, self.b, self.n).permute(3, 0, 4, 2, 1)
        return x.reshape(self.b, groups, self.n, self.chunks * self.t)[..., : self.length]

    def rows_of(self, state: Tensor) -> Tensor:
        """(b, D, N) as (G, b, N, c)."""
        return state.view(self.b, self.groups, self.c, self.n).permute(1, 0, 3, 2).contiguous()

    def state_of(self, rows: Tensor) -> Tensor:
        """(G, b, N, c) as (b, D, N)."""
        return rows.permute(1, 0, 3, 2).reshape(self.b, self.groups * self.c, self.n)

    def spans(self) -> Iterator[_Span]:
        """Whole rows where a row is small, else a part of the states of one; of the channels, too, where these are very many.

        States are cut before channels, since every product runs along channels, and short runs take longer.
        """
        rows = self.rows if self.parallel or self.chunks == 1 else self.b
        c = _equal_part(self.c, self.block // (self.t * min(self.n, FEWEST)))
        n = _equal_part(self.n, self.block // (self.t * c))
        r = min(rows, max(1, self.block // (self.t * c * n)))
        for row in range(0, rows, r):
            for channel in range(0, self.c, c):
                for state in range(0, self.n, n):
                    ends = min(row + r, rows), min(state + n, self.n), min(channel + c, self.c)
                    yield _Span(*map(slice, (row, state, channel), ends))

    def scratch(self, number: int, *shape: int) -> Tensor:
        """A tensor of this shape in memory that is used again for each block, and by the next scan of this thread."""
        size = math.prod(shape)
        if self._scratch[number].numel() < size:
            self._scratch[number] = torch.empty(size, **self.like)
        return self._scratch[number][:size].view(shape)

    def parts(self) -> Iterator[int]:
        """First row of what is computed at once: all rows, or one chunk of all sequences after another."""
        yield from range(0, self.rows, self.rows if self.parallel or self.chunks == 1 else self.b)

    def decays(self, g: int, span: _Span, out: Tensor, begin: int = 0) -> None:
        """exp(delta A) of a block from step ``begin`` on, (T - begin, r, N, c)."""
        at, states, channels = span
        torch.mul(self.delta[g, begin:, at, None, channels], self.A_log2[g, states, channels], out=out)
        if self.lowest is not None:
            out.clamp_(min=self.lowest)
        out.exp2_()

    def states(self, g: int, span: _Span, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """Decays and states of a block, (T, r, N, c), in scratch 0 and 1; without a first state, no decay of the first step."""
        at, states, channels = span
        decay, state = (self.scratch(number, self.t, *(x.stop - x.start for x in span)) for number in (0, 1))
        begin = 0 if first is not None else 1
        self.decays(g, span, decay[begin:], begin)
        torch.mul(self.du[g, :, at, None, channels], self.B[g, :, at, states, None], out=state)
        steps, factors = state.unbind(0), decay.unbind(0)
        if first is not None:
            steps[0].addcmul_(factors[0], first)
        for t in range(1, self.t):
            steps[t].addcmul_(factors[t], steps[t - 1])
        return decay, state

    def first_states(self, state: Tensor | None) -> Tensor | None:
        """The state before each chunk, (G, S b, N, c); None where it is 0 for all of them.

        Chunks that are computed one after another get theirs in ``forward``; then only the first is known here.
        """
        first = None if state is None else self.rows_of(state)
        if self.chunks == 1:
            return first
        firsts = torch.zeros(self.groups, self.rows, self.n, self.c, **self.like)
        if first is not None:
            firsts[:, : self.b] = first
        if self.parallel:
            ends = torch.empty_like(firsts)
            for g in range(self.groups):
                for span in self.spans():
                    ends[g, *span] = self.states(g, span, None)[1][-1]
            whole = self.whole_decays()
            for k in range(1, self.chunks):
                before, here = slice((k - 1) * self.b, k * self.b), slice(k * self.b, (k + 1) * self.b)
                firsts[:, here] = ends[:, before] + whole[:, before] * firsts[:, before]
        return firsts

    def whole_decays(self) -> Tensor:
        """The decay over each chunk, (G, S b, N, c)."""
        return (self.delta.sum(dim=1)[:, :, None] * self.A[:, None]).exp_()

    def forward(self, firsts: Tensor | None, *, ends: bool) -> tuple[Tensor, Tensor | None]:
        """y (b, D, L) and the last state (b, D, N) if ``ends``; writes first states of chunks that come one after another."""
        y = torch.empty(self.groups, self.t, self.rows, self.c, **self.like)
        last = torch.empty(self.groups, self.b, self.n, self.c, **self.like) if ends else None
        for start in self.parts():
            for g in range(self.groups):
                for span in self.spans():
                    at, states, channels = span = span.after(start)
                    decay, state = self.states(g, span, None if firsts is None else firsts[g, *span])
                    end = self.rows - self.b
                    if not self.parallel and self.chunks > 1 and start < end:
                        assert firsts is not None
                        firsts[g, at.start + self.b : at.stop + self.b, states, channels] = state[-1]
                    if last is not None and at.stop > end:
                        skip = max(0, end - at.start)
                        last[g, at.start + skip - end : at.stop - end, states, channels] = state[-1, skip:]
                    part = _over_states(state, self.C[g, :, at, states], decay)
                    _put(y[g, :, at, channels], part, states)
        return self.join(y), None if last is None else self.state_of(last)

    def backward(
        self, firsts: Tensor | None, dy: Tensor, dlast: Tensor | None, *, given: bool
    ) -> tuple[Tensor | None, ...]:
        """Gradients of u, delta, A, B, C and, if it was ``given``, of the first state."""
        dy = self.cut(dy)
        q, wa = torch.empty_like(self.du), torch.zeros_like(self.du)
        dA = torch.zeros_like(self.A)
        dB, dC = torch.zeros_like(self.B), torch.zeros_like(self.C)
        # adjoint that enters each row from behind: of the last state, or of the next chunk's first one
        enters = None
        if self.chunks > 1 or dlast is not None:
            enters = torch.zeros(self.groups, self.rows, self.n, self.c, **self.like)
            if dlast is not None:
                enters[:, self.rows - self.b :] = self.rows_of(dlast.contiguous())
            if self.parallel:
                self.adjoints(dy, enters)
        dfirst = torch.empty(self.groups, self.b, self.n, self.c, **self.like) if given else None
        for start in reversed(list(self.parts())):
            for g in range(self.groups):
                for span in self.spans():
                    at, states, channels = span = span.after(start)
                    first = None if firsts is None else firsts[g, *span]
                    decay, state = self.states(g, span, first)
                    adjoint = self.adjoint(g, span, dy, decay, None if enters is None else enters[g, *span])
                    # decay becomes g_t p_t, that is g_t a_t h_{t-1}
                    weighted = decay
                    weighted[1:].mul_(adjoint[1:]).mul_(state[:-1])
                    begin = 1  # before the first step there was nothing that A could let decay
                    if first is not None:
                        begin = 0
                        weighted[0].mul_(adjoint[0])
                        self.pass_on(weighted[0], g, span, dfirst, enters)
                        weighted[0].mul_(first)
                    dC[g, :, at, states] += _over_channels(state, dy[g, :, at, channels])
                    spare, weighted = state, weighted[begin:]
                    torch.mul(weighted, self.A[g, states, channels], out=spare[begin:])
                    wa[g, begin:, at, channels] += spare[begin:].sum(dim=2)
                    self.add_products(dA[g, states, channels], weighted, self.delta[g, begin:, at, None, channels])
                    _put(q[g, :, at, channels], _over_states(adjoint, self.B[g, :, at, states], spare), states)
                    dB[g, :, at, states] += _over_channels(adjoint, self.du[g, :, at, channels])
        du = q * self.delta
        ddelta = q.mul_(self.u).add_(wa)
        return (
            self.join(du),
            self.join(ddelta),
            dA.transpose(1, 2).reshape(-1, self.n),
            self.join_states(dB, self.b_groups),
            self.join_states(dC, self.c_groups),
            None if dfirst is None else self.state_of(dfirst),
        )

    def adjoint(self, g: int, span: _Span, dy: Tensor, decay: Tensor, behind: Tensor | None) -> Tensor:
        """The gradient of each state of a block, (T, r, N, c), in scratch 2."""
        at, states, channels = span
        found = self.scratch(2, *decay.shape)
        torch.mul(dy[g, :, at, None, channels], self.C[g, :, at, states, None], out=found)
        steps, factors = found.unbind(0), decay.unbind(0)
        if behind is not None:
            steps[-1].add_(behind)
        for t in range(self.t - 2, -1, -1):
            steps[t].addcmul_(factors[t + 1], steps[t + 1])
        return found

    @staticmethod
    def add_products(total: Tensor, block: Tensor, weights: Tensor) -> None:
        """Add block (T, r, N, c) times weights (T, r, 1, c) to (N, c), over steps and rows; ``block`` is written over."""
        if block.shape[1] == 1 and total.numel() >= LARGE:
            for part, weight in zip(block.unbind(0), weights.unbind(0), strict=True):
                total.addcmul_(part[0], weight[0])
        else:
            total += block.mul_(weights).flatten(0, 1).sum(dim=0)

    def pass_on(self, found: Tensor, g: int, span: _Span, dfirst: Tensor | None, enters: Tensor | None) -> None:
        """Give the adjoint of the rows' first states to the chunk before, or keep it as the first state's gradient."""
        at, states, channels = span
        if at.start < self.b:
            if dfirst is not None:
                stop = min(at.stop, self.b)
                dfirst[g, at.start : stop, states, channels] = found[: stop - at.start]
        elif not self.parallel and enters is not None:
            enters[g, at.start - self.b : at.stop - self.b, states, channels] = found

    def adjoints(self, dy: Tensor, enters: Tensor) -> None:
        """Fill in what enters each chunk from behind: its successor's own part, and what passes through that."""
        own = torch.empty_like(enters)
        for g in range(self.groups):
            for span in self.spans():
                decay = self.scratch(0, self.t, *(x.stop - x.start for x in span))
                self.decays(g, span, decay)
                steps = self.adjoint(g, span, dy, decay, None)
                own[g, *span] = steps[0] * decay[0]
        whole = self.whole_decays()
        for k in range(self.chunks - 1, 0, -1):
            here, before = slice(k * self.b, (k + 1) * self.b), slice((k - 1) * self.b, k * self.b)
            enters[:, before] = own[:, here] + whole[:, here] * enters[:, here]


_SCRATCH = threading.local()


def _kept(like: Tensor) -> list[Tensor]:
    """This thread's three tensors of scratch, which grow; memory that is new to a process costs a page fault per 4 KiB."""
    key = like.dtype, like.device
    if getattr(_SCRATCH, "key", None) != key:
        _SCRATCH.key, _SCRATCH.tensors = key, [like.new_empty(0) for _ in range(3)]
    return cast("list[Tensor]", _SCRATCH.tensors)


def _largest(x: Tensor) -> float:
    """The largest absolute value."""
    low, high = torch.aminmax(x)
    return max(-float(low), float(high))


def _equal_part(whole: int, most: int) -> int:
    """The length of equal parts of ``whole`` that are no longer than ``most``, nor shorter than 1."""
    return -(-whole // -(-whole // max(1, most)))


def _put(place: Tensor, part: Tensor, states: slice) -> None:
    """Write the sum over a row's first states, and add those over later ones."""
    if states.start:
        place += part
    else:
        place.copy_(part)


def _over_states(block: Tensor, weights: Tensor, spare: Tensor) -> Tensor:
    """Sum over the states of a block (T, r, N, c) times weights (T, r, N), as (T, r, c); ``spare`` is written over."""
    if block.shape[2] * block.shape[3] >= MATRIX:
        return torch.matmul(weights[:, :, None], block)[:, :, 0]
    return torch.mul(block, weights[..., None], out=spare).sum(dim=2)


def _over_channels(block: Tensor, weights: Tensor) -> Tensor:
    """Sum over the channels of a block (T, r, N, c) times weights (T, r, c), as (T, r, N); ``block`` is written over."""
    if block.shape[2] * block.shape[3] >= MATRIX:
        return torch.matmul(weights[:, :, None], block.transpose(2, 3))[:, :, 0]
    return block.mul_(weights[:, :, None]).sum(dim=3)
