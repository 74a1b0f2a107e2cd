"""The selective scan against a recurrence of single numbers, closed forms, finite differences and other libraries."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mamba_fscil import scan as scan_module
from mamba_fscil.scan import selective_scan, selective_scan_reference

from tenfold.errors import MissingExtraError
from tenfold.memory import MemoryProbe


def problem(b=2, d=6, n=4, length=7, groups=None, *, dtype=torch.float64, seed=0):
    """Random inputs by name; ``groups`` None gives B and C of three dimensions, 0 constant ones."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    shape = {None: (b, n, length), 0: (d, n)}.get(groups, (b, groups, n, length))
    found = {
        "u": normal(b, d, length),
        "delta": F.softplus(normal(b, d, length)),
        "A": -torch.exp(normal(d, n)),
        "B": normal(*shape),
        "C": normal(*shape),
        "D": normal(d),
        "initial_state": normal(b, d, n),
    }
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def by_numbers(u, delta, A, B, C, D=None, initial_state=None):
    """The recurrence over single numbers, in Python, in double precision."""
    b, d, length = u.shape
    n = A.shape[1]
    u, delta, A, B, C = (x.double().numpy() for x in (u, delta, A, B, C))
    y, last = np.zeros((b, d, length)), np.zeros((b, d, n))
    for i, c in itertools.product(range(b), range(d)):
        for s in range(n):
            h = 0.0 if initial_state is None else float(initial_state[i, c, s])
            for t in range(length):
                if B.ndim == 2:
                    write, read = B[c, s], C[c, s]
                elif B.ndim == 3:
                    write, read = B[i, s, t], C[i, s, t]
                else:
                    g = c // (d // B.shape[1])
                    write, read = B[i, g, s, t], C[i, g, s, t]
                h = math.exp(delta[i, c, t] * A[c, s]) * h + delta[i, c, t] * u[i, c, t] * write
                y[i, c, t] += read * h
            last[i, c, s] = h
        if D is not None:
            y[i, c] += float(D[c]) * u[i, c]
    return torch.from_numpy(y), torch.from_numpy(last)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.sampled_from([None, 0, 1, 2]),
    st.booleans(), st.sampled_from([1, 7, 40, 10**6]), st.sampled_from([2, 3, 64]), st.sampled_from([0, 10**6]),
)  # fmt: skip
def test_equals_the_recurrence_whatever_the_blocks_and_chunks(b, d, n, length, groups, first, block, chunk, parallel):
    p = problem(b, 2 * d, n, length, groups)
    if not first:
        del p["initial_state"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "PARALLEL", parallel)
        y, last = selective_scan(**p, block=block, chunk=chunk, return_last_state=True)
    expected, end = by_numbers(**p)
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(last, end, rtol=1e-12, atol=1e-12)
    single = {name: x.float() for name, x in p.items()}
    assert torch.allclose(selective_scan(**single).double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(selective_scan_reference(**p), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [None, 0, 2])
@pytest.mark.parametrize(
    ("block", "chunk", "parallel"), [(None, None, 10**6), (5, 64, 10**6), (9, 2, 10**6), (9, 2, 0)]
)
def test_gradients_of_all_seven_inputs_and_of_the_state_are_those_of_finite_differences(
    groups, block, chunk, parallel, monkeypatch
):
    monkeypatch.setattr(scan_module, "PARALLEL", parallel)
    p = problem(1 if groups is None else 2, 2, 2, 3, groups)
    p["z"], p["delta_bias"] = torch.randn_like(p["u"]), torch.randn_like(p["D"])
    names = list(p)
    for x in p.values():
        x.requires_grad_()

    def both(*tensors):
        how = {"delta_softplus": True, "return_last_state": True, "block": block, "chunk": chunk}
        return selective_scan(**dict(zip(names, tensors, strict=True)), **how)

    assert torch.autograd.gradcheck(both, tuple(p.values()))


def test_gradients_equal_those_of_the_recurrence_by_autograd_at_a_larger_shape():
    for parallel, (b, d, n, length) in itertools.product((0, 10**9), [(3, 16, 8, 25), (1, 8, 16, 300)]):
        p = problem(b, d, n, length, 2)
        for x in p.values():
            x.requires_grad_()
        weights = torch.randn(b, d, length, dtype=torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scan_module, "PARALLEL", parallel)
            ours = torch.autograd.grad((selective_scan(**p, block=700) * weights).sum(), list(p.values()))
        theirs = torch.autograd.grad((selective_scan_reference(**p) * weights).sum(), list(p.values()))
        for name, a, e in zip(p, ours, theirs, strict=True):
            assert torch.allclose(a, e, rtol=1e-9, atol=1e-9), name


def test_one_token_is_delta_u_times_b_dot_c():
    p = problem(length=1)
    del p["initial_state"]
    dot = (p["B"] * p["C"]).sum(1)[:, None]
    assert torch.allclose(selective_scan(**p), p["delta"] * p["u"] * dot + p["D"][:, None] * p["u"])


def test_without_decay_the_state_is_a_running_sum():
    p = problem()
    del p["initial_state"]
    p["A"] = torch.zeros_like(p["A"])
    h = torch.cumsum((p["delta"] * p["u"])[:, :, None] * p["B"][:, None], dim=-1)
    assert torch.allclose(selective_scan(**p), (h * p["C"][:, None]).sum(2) + p["D"][:, None] * p["u"])


def test_with_infinite_decay_each_token_stands_alone():
    p = problem()
    p["A"] = torch.full_like(p["A"], -1e9)
    dot = (p["B"] * p["C"]).sum(1)[:, None]
    expected = p["delta"] * p["u"] * dot + p["D"][:, None] * p["u"]
    assert torch.allclose(selective_scan(**p), expected, atol=1e-12)


def test_with_constant_parameters_it_is_a_causal_convolution():
    p = problem(1, 3, 4, 9, 0)
    del p["initial_state"], p["D"]
    p["delta"] = p["delta"][:, :, :1].expand(-1, -1, 9)
    step = p["delta"][0, :, 0]
    y = selective_scan(**p)
    for c in range(3):
        kernel = [float((step[c] * p["C"][c] * p["B"][c] * torch.exp(j * step[c] * p["A"][c])).sum()) for j in range(9)]
        assert np.allclose(y[0, c], np.convolve(p["u"][0, c], kernel)[:9])


def test_it_is_linear_in_the_input_and_in_the_readout():
    p = problem()
    del p["initial_state"]
    other = torch.randn_like(p["u"])
    both = selective_scan(**{**p, "u": 2 * p["u"] - 3 * other})
    assert torch.allclose(both, 2 * selective_scan(**p) - 3 * selective_scan(**{**p, "u": other}))
    del p["D"]
    assert torch.allclose(selective_scan(**{**p, "C": -4 * p["C"]}), -4 * selective_scan(**p))


def test_a_token_changes_nothing_before_it_bit_for_bit():
    p = problem(dtype=torch.float32)
    changed = {name: x.clone() for name, x in p.items()}
    for name in ("u", "delta", "B", "C"):
        changed[name][..., 4] += 1
    a, b = selective_scan(**p), selective_scan(**changed)
    assert torch.equal(a[..., :4], b[..., :4])
    assert not torch.equal(a[..., 4], b[..., 4])


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_two_calls_that_hand_on_the_state_equal_one(cut):
    p = problem()
    whole, end = selective_scan(**p, return_last_state=True)
    timed = {"u", "delta", "B", "C"}
    first = {name: x[..., :cut] if name in timed else x for name, x in p.items()}
    rest = {name: x[..., cut:] if name in timed else x for name, x in p.items()}
    y, state = selective_scan(**first, return_last_state=True)
    z, last = selective_scan(**{**rest, "initial_state": state}, return_last_state=True)
    assert torch.allclose(torch.cat([y, z], dim=-1), whole)
    assert torch.allclose(last, end)


def test_permuted_channels_permute_the_outputs_and_permuted_states_change_nothing():
    p = problem()
    order = torch.randperm(6)
    moved = {name: p[name][:, order] for name in ("u", "delta", "initial_state")}
    moved |= {name: p[name][order] for name in ("A", "D")}
    assert torch.allclose(selective_scan(**{**p, **moved}), selective_scan(**p)[:, order])
    states = torch.randperm(4)
    moved = {"A": p["A"][:, states], "initial_state": p["initial_state"][..., states]}
    moved |= {name: p[name][:, states] for name in ("B", "C")}
    assert torch.allclose(selective_scan(**{**p, **moved}), selective_scan(**p))


def test_softplus_bias_and_gate_equal_the_composition():
    p = problem()
    z, bias = torch.randn_like(p["u"]), torch.randn_like(p["D"])
    fused = selective_scan(**p, z=z, delta_bias=bias, delta_softplus=True)
    steps = F.softplus(p["delta"] + bias[:, None])
    assert torch.allclose(fused, selective_scan(**{**p, "delta": steps}) * F.silu(z))


def test_large_steps_and_fast_decays_over_a_long_sequence_stay_finite():
    p = problem(1, 2, 3, 4096, dtype=torch.float32)
    p["A"] = torch.full_like(p["A"], -256)
    p["delta"] = 50 * torch.rand_like(p["delta"])
    for x in p.values():
        x.requires_grad_()
    y = selective_scan(**p)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(x.grad.isfinite().all() for x in p.values())


def test_memory_beyond_inputs_and_gradients_is_that_of_the_blocks():
    """A tensor over (b, D, L, N) would take 13 MB here; the textbook keeps several of them."""
    p = problem(4, 64, 64, 200, dtype=torch.float32)
    del p["initial_state"]
    for x in p.values():
        x.requires_grad_()
    with MemoryProbe(p) as probe:
        selective_scan(**p, block=2**15).sum().backward()
    whole = 4 * 4 * 64 * 64 * 200
    assert probe.peak_bytes - probe.start_bytes < whole / 2
    assert probe.saved_bytes < whole / 8


def test_half_precision_inputs_are_computed_in_single_precision_also_under_autocast():
    p = problem(dtype=torch.float32)
    y = selective_scan(**{**p, "u": p["u"].bfloat16()})
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), selective_scan(**{**p, "u": p["u"].bfloat16().float()}), rtol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selective_scan(**p), selective_scan(**p))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": lambda p: p["A"].abs()}, "A must not be positive"),
        ({"delta": lambda p: p["delta"][..., :-1]}, r"delta must be \(2, 6, 7\)"),
        ({"B": lambda p: p["B"][:, :-1]}, r"B must be \(6, 4\), \(2, 4, 7\) or"),
        ({"B": lambda p: p["B"][:, None].expand(-1, 4, -1, -1)}, "4 groups, which do not divide the 6 channels"),
        ({"D": lambda p: p["D"][:-1]}, r"D must be \(6,\)"),
        ({"u": lambda p: p["u"][0]}, r"u must be \(b, D, L\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(change, message):
    p = problem()
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**p, **{name: make(p) for name, make in change.items()}})


def test_a_complex_or_whole_number_tensor_is_refused():
    p = problem()
    with pytest.raises(TypeError, match="A must hold real"):
        selective_scan(**{**p, "A": p["A"].to(torch.complex128)})


def test_mamba_ssm_is_refused_with_the_line_that_installs_it_or_with_what_it_cannot_take():
    p = problem(dtype=torch.float32)
    with pytest.raises(MissingExtraError, match="pip install"):
        selective_scan(**p, backend="mamba_ssm")


def test_a_mamba_ssm_that_does_not_import_is_one_warning_and_never_an_error(monkeypatch, tmp_path):
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm/__init__.py").write_text("raise ImportError('selective_scan_cuda: no such symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mamba_ssm", raising=False)

    class OnGPU(torch.Tensor):
        is_cuda = True

    u = torch.zeros(1, 2, 3).as_subclass(OnGPU)
    with pytest.warns(UserWarning, match="mamba-ssm does not import .*no such symbol"):
        assert scan_module._kernel(u, torch.zeros(2, 4), None, asked=False) is None
    assert scan_module._kernel(u, torch.zeros(2, 4), None, asked=False) is None
    with pytest.raises(MissingExtraError, match="does not import"):
        scan_module._kernel(u, torch.zeros(2, 4), None, asked=True)
    with pytest.raises(ValueError, match="at most 256 states"):
        scan_module._kernel(u, torch.zeros(2, 300), None, asked=True)


def test_equals_mambapy_and_the_slow_mixer_of_transformers():
    from mambapy.pscan import pscan

    p = problem(2, 6, 4, 8)
    steps = p["delta"].transpose(1, 2)[..., None]
    x = (p["delta"] * p["u"]).transpose(1, 2)[..., None] * p["B"].transpose(1, 2)[:, :, None]
    h = pscan(torch.exp(steps * p["A"]), x)
    theirs = (h @ p["C"].transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
    del p["D"], p["initial_state"]
    assert torch.allclose(selective_scan(**p), theirs)
