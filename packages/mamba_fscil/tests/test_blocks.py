"""Blocks and projectors: sizes of the authors' models, paths through maps, the closed gate, and other people's weights."""

import pytest
import torch
import torch.nn.functional as F
from mamba_fscil.backbones import ResNet12
from mamba_fscil.blocks import PATHS, SS2D, VMAMBA_PATHS, MambaBlock, scan_order
from mamba_fscil.config import ProjectorConfig
from mamba_fscil.projector import DualSSMProjector, MLPProjector, Projector, SelectiveBranch, SSMProjector
from mamba_fscil.scan import selective_scan_reference

from tenfold import UserError
from tenfold.testing import assert_gradient_isolated

TINY = ProjectorConfig(width=8, states=3, rank=2)


def count(module):
    return sum(p.numel() for p in module.parameters())


def opened(projector):
    """With an incremental branch whose gate is no longer closed."""
    projector.add_incremental_branch()
    torch.nn.init.normal_(projector.inc.block.in_proj.weight, std=0.5)
    return projector


def test_parameters_are_as_many_as_in_the_authors_models():
    assert count(ResNet12()) == 12_424_320
    cifar = SelectiveBranch(640, (2, 2), 640, ProjectorConfig(states=256, rank=256))
    assert [count(cifar.mlp_proj), count(cifar.block), cifar.pos_embed.numel()] == [1_649_920, 1_642_880, 2_560]
    assert count(cifar) == 3_295_360
    mini = Projector(640, (5, 5), ProjectorConfig(width=512, states=256, rank=256))
    assert (count(mini.base), count(mini.residual)) == (2_735_872, 327_680)
    cub = Projector(512, (7, 7), ProjectorConfig(version="ss2d", width=1024, states=256, rank=256, inc_layers=3))
    cub.add_incremental_branch()
    assert (count(cub.base), count(cub.inc), count(cub.residual)) == (9_084_928, 10_234_880, 524_288)


@pytest.mark.parametrize("path", PATHS)
def test_back_from_each_path_through_a_map_that_is_not_square(path):
    order = scan_order(path, (3, 5))
    x = torch.randn(15)
    assert torch.equal(x[order][order.argsort()], x)
    if path == "column":
        assert order[:4].tolist() == [0, 5, 10, 1]


def test_turning_the_map_swaps_rows_and_columns():
    block = SS2D(6, 3, rank=2, paths=["row"])
    turned = SS2D(6, 3, rank=2, paths=["column"])
    state = block.state_dict()
    state["conv2d.weight"] = state["conv2d.weight"].transpose(2, 3)
    turned.load_state_dict(state)
    maps = torch.randn(2, 3, 5, 6)
    assert torch.allclose(block(maps), turned(maps.transpose(1, 2)).transpose(1, 2), atol=1e-6)


def test_one_pass_over_four_paths_equals_four_passes_and_the_gate_is_four_times_its_own():
    block = MambaBlock(6, 3, rank=2)
    torch.nn.init.normal_(block.x_proj.weight)
    tokens = torch.randn(2, 15, 6)
    out = block.over_map(tokens, (3, 5))
    total = 0
    for path in PATHS:
        order = scan_order(path, (3, 5))
        total = total + block(tokens[:, order])[:, order.argsort()]
    assert torch.allclose(out.tokens, total, atol=1e-6)
    assert torch.allclose(out.gate, 4 * block.in_proj(tokens).chunk(2, dim=-1)[1])


def test_a_map_scan_with_one_path_equals_a_plain_scan():
    block = SS2D(4, 3, rank=2, paths=["row"])
    maps = torch.randn(2, 3, 5, 4)
    x, z = block.in_proj(maps.flatten(1, 2)).chunk(2, dim=-1)
    x = F.silu(block.conv2d(x.transpose(1, 2).reshape(2, 4, 3, 5))).flatten(2)
    low, B, C = (block.x_proj_weight[0] @ x).split([2, 3, 3], dim=1)
    y = selective_scan_reference(
        x, block.dt_projs_weight[0] @ low, -block.A_logs.exp(), B, C, block.Ds,
        delta_bias=block.dt_projs_bias[0], delta_softplus=True,
    )  # fmt: skip
    expected = block.out_norm(y.transpose(1, 2)) * F.silu(z)
    assert torch.allclose(block(maps).flatten(1, 2), expected, atol=1e-5)


def test_weights_of_transformers_mixer_load_by_name_and_give_the_same():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=8, state_size=4, expand=2, time_step_rank=3, use_mambapy=False)
    theirs = MambaMixer(config, layer_idx=0)
    ours = MambaBlock(8, 4, expand=2, rank=3, out_proj=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 8)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_weights_of_mambapy_load_by_name_and_give_the_same():
    from mambapy.mamba import MambaBlock as Theirs
    from mambapy.mamba import MambaConfig

    theirs = Theirs(MambaConfig(d_model=8, n_layers=1, d_state=4, expand_factor=2, dt_rank=3))
    ours = MambaBlock(8, 4, expand=2, rank=3, out_proj=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 8)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_vmambas_order_of_paths_is_that_of_its_cross_scan():
    """Rows, columns, and both reversed, as VMamba stacks them."""
    x = torch.arange(6).view(2, 3)
    expected = [x.flatten(), x.t().flatten(), x.flatten().flip(0), x.t().flatten().flip(0)]
    for path, order in zip(VMAMBA_PATHS, expected, strict=True):
        assert torch.equal(scan_order(path, (2, 3)), order)


@pytest.mark.parametrize("version", ["ssm", "ss2d", "mlp"])
def test_a_fresh_incremental_branch_changes_nothing_bit_for_bit(version):
    projector = Projector(6, (3, 5), ProjectorConfig(version=version, width=8, states=3, rank=2)).eval()
    maps = torch.randn(4, 6, 3, 5)
    before = projector(maps).mu
    projector.add_incremental_branch()
    out = projector(maps)
    assert torch.equal(out.mu, before)
    assert not out.inc.any()


@pytest.mark.parametrize("version", ["ssm", "ss2d"])
def test_the_first_gradient_reaches_the_gate_alone(version):
    projector = Projector(6, (3, 5), ProjectorConfig(version=version, width=8, states=3, rank=2))
    projector.add_incremental_branch()
    weights = dict(projector.inc.named_parameters())
    gate = weights.pop("block.in_proj.weight")
    loss = projector(torch.randn(4, 6, 3, 5)).mu.square().sum()
    assert_gradient_isolated(loss, reaches=[gate], spares=[*weights.values(), *projector.base.parameters()])
    grad = torch.autograd.grad(loss, gate)[0]
    assert not grad[:8].any()
    assert grad[8:].any()


def test_the_kept_frozen_output_equals_the_whole_forward_pass():
    projector = opened(DualSSMProjector(6, (3, 5), TINY)).eval()
    maps = torch.randn(4, 6, 3, 5)
    kept = projector.frozen_output(maps)
    assert torch.equal(projector(maps, kept).mu, projector(maps).mu)
    assert torch.allclose(projector(maps[1:3], kept[1:3]).mu, projector(maps).mu[1:3], atol=1e-6)


def test_with_detaching_the_base_side_and_the_maps_get_no_gradient_and_without_the_base_side_does():
    projector = opened(DualSSMProjector(6, (3, 5), TINY))
    maps = torch.randn(4, 6, 3, 5, requires_grad=True)
    base = [*projector.base.parameters(), projector.residual.weight]
    loss = projector(maps).mu.square().sum()
    assert_gradient_isolated(loss, reaches=[projector.inc.pos_embed], spares=[maps, *base])
    loss = projector(maps, detach=False).mu.square().sum()
    assert_gradient_isolated(loss, reaches=[projector.inc.pos_embed, *base], spares=[])


def test_another_width_needs_a_residual_matrix_and_another_map_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match="width 8 differs from the 6 channels"):
        Projector(6, (3, 5), TINY, residual=False)
    assert isinstance(Projector(8, (3, 5), TINY).residual, torch.nn.Identity)
    projector = SSMProjector(6, (3, 5), TINY)
    with pytest.raises(UserError, match=r"maps are \(6, 5, 3\) each, the projector was made for \(6, 3, 5\)"):
        projector(torch.randn(2, 6, 5, 3))


def test_the_static_projector_looks_at_the_mean_of_the_map_alone():
    projector = MLPProjector(6, (3, 5), TINY)
    maps = torch.randn(2, 6, 3, 5)
    shuffled = maps.flatten(2)[..., torch.randperm(15)].view_as(maps)
    assert torch.allclose(projector(maps).mu, projector(shuffled).mu, atol=1e-6)
    assert projector(maps).gate is None
