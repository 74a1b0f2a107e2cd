"""Projectors from a backbone's map to an embedding: static (MLP), selective (one branch), and dual (a frozen and a new one).

Legend of shapes: b batch, c channels, H x W map, L = H W tokens, d width of an embedding.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mamba_fscil.blocks import SS2D, MambaBlock
from mamba_fscil.config import ProjectorConfig
from tenfold import UserError

Params = tuple[Tensor, Tensor, Tensor]


class BranchOutput(NamedTuple):
    """What one branch gives.

    Attributes:
        mu: (b, d).
        gate: (b, L, D), the gate before its SiLU times the paths that share it; None for an MLP.
        params: means over the tokens of low-rank delta, B and C; None for an MLP.
    """

    mu: Tensor
    gate: Tensor | None
    params: Params | None


class ProjectorOutput(NamedTuple):
    """What a projector gives.

    Attributes:
        mu: (b, d), the embedding: the sum of the next two.
        frozen: (b, d), the identity's (or the residual projection's) and the base branch's part.
        inc: (b, d), the incremental branch's part; None without one.
        gate: (b, L, D), of the incremental branch, else of the base branch; None for MLPs.
        params: mean low-rank delta, B and C of the same branch; None for MLPs.
    """

    mu: Tensor
    frozen: Tensor
    inc: Tensor | None
    gate: Tensor | None
    params: Params | None

    def rows(self, index: Tensor) -> "ProjectorOutput":
        """The same of some of its rows, in the order of ``index`` (n,); a row may be there several times."""
        params = self.params and (self.params[0][index], self.params[1][index], self.params[2][index])
        inc, gate = (part if part is None else part[index] for part in (self.inc, self.gate))
        return ProjectorOutput(self.mu[index], self.frozen[index], inc, gate, params)


class SelectiveBranch(nn.Module):
    """MLP on the map, position embedding, selective scan, gate, mean over the tokens.

    Args:
        channels: channels c of the map.
        size: height and width of the map; both are in the shapes of the parameters.
        width: width d of the embedding.
        config: version, states, rank, expand.
        layers: convolutions of the MLP, 2 or 3.
        closed: begin with a gate of zeros, so that the branch gives exactly 0; the gate then gets the first gradient.

    Source: Mamba-FSCIL, arXiv 2407.06136, framework figure; sizes and initial values of the authors' code.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        width: int,
        config: ProjectorConfig,
        layers: int = 2,
        *,
        closed: bool = False,
    ) -> None:
        super().__init__()
        self.size = size
        hidden = 2 * channels
        parts: list[nn.Module] = []
        for number in range(layers - 1):
            parts += [nn.Conv2d(hidden if number else channels, hidden, 1), nn.LayerNorm((hidden, *size))]
            parts += [nn.LeakyReLU(0.1)]
        self.mlp_proj = nn.Sequential(*parts, nn.Conv2d(hidden, width, 1, bias=False))
        self.pos_embed = nn.Parameter(torch.zeros(1, size[0] * size[1], width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        kind = SS2D if config.version == "ss2d" else MambaBlock
        self.block: MambaBlock | SS2D = kind(width, config.states, expand=config.expand, rank=config.rank)
        inner = config.expand * width
        self.to_width = nn.Linear(inner, width, bias=False) if inner != width else nn.Identity()
        if closed:
            with torch.no_grad():
                self.block.in_proj.weight[inner:] = 0

    def forward(self, maps: Tensor) -> BranchOutput:
        """Shapes: ``maps`` (b, c, H, W) -> see ``BranchOutput``."""
        tokens_BLd = self.mlp_proj(maps).flatten(2).transpose(1, 2) + self.pos_embed
        out = self.block.over_map(tokens_BLd, self.size)
        return BranchOutput(self.to_width(out.tokens.mean(dim=1)), out.gate, out.params)


class StaticBranch(nn.Module):
    """An MLP on the mean of the map.

    Args:
        channels: channels c of the map.
        width: width d of the embedding.
        closed: begin with a last layer of zeros, so that the branch gives exactly 0.

    Source: NC-FSCIL, arXiv 2302.03004, section 5.1: two hidden layers of twice the width.
    """

    def __init__(self, channels: int, width: int, *, closed: bool = False) -> None:
        super().__init__()
        hidden = 2 * channels
        last = nn.Linear(hidden, width, bias=False)
        self.mlp = nn.Sequential(
            *(nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(0.1)),
            *(nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(0.1)),
            last,
        )
        if closed:
            nn.init.zeros_(last.weight)

    def forward(self, maps: Tensor) -> BranchOutput:
        """Shapes: ``maps`` (b, c, H, W) -> see ``BranchOutput``."""
        return BranchOutput(self.mlp(maps.mean(dim=(2, 3))), None, None)


class Projector(nn.Module):
    """Identity (or a residual projection), base branch, and an incremental branch where one was added.

        mu = R mean(F) + g_base(F) + g_inc(F)

    Args:
        channels: channels c of the map.
        size: height and width of the map.
        config: shape; ``version`` is that of both branches.
        residual: whether R is a matrix. It has to be where the width differs from the channels.

    Raises:
        ValueError: another width than the channels, without a residual projection.

    Source: Mamba-FSCIL, arXiv 2407.06136, framework figure.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        config: ProjectorConfig | None = None,
        *,
        residual: bool | None = None,
    ) -> None:
        super().__init__()
        self.config = config or ProjectorConfig()
        self.channels, self.size = channels, (int(size[0]), int(size[1]))
        self.width = self.config.width or channels
        if residual is None:
            residual = self.width != channels
        if not residual and self.width != channels:
            raise ValueError(
                f"width {self.width} differs from the {channels} channels: a residual projection is needed"
            )
        self.residual = nn.Linear(channels, self.width, bias=False) if residual else nn.Identity()
        self.base = self._branch(self.config.layers, closed=False)
        self.inc: SelectiveBranch | StaticBranch | None = None

    def _branch(self, layers: int, *, closed: bool) -> SelectiveBranch | StaticBranch:
        if self.config.version == "mlp":
            return StaticBranch(self.channels, self.width, closed=closed)
        return SelectiveBranch(self.channels, self.size, self.width, self.config, layers, closed=closed)

    def add_incremental_branch(self) -> None:
        """Add g_inc with a gate of zeros; the embedding stays as it is, bit for bit. Nothing where there is one."""
        if self.inc is None:
            self.inc = self._branch(self.config.inc_layers, closed=True).to(next(self.parameters()).device)

    def freeze_base(self) -> None:
        """Leave the gradients of the base side out."""
        self.residual.requires_grad_(False)
        self.base.requires_grad_(False)

    def check(self, maps: Tensor) -> None:
        """Check the shape of maps.

        Raises:
            UserError: another number of channels, or another size.
        """
        expected = (self.channels, *self.size)
        if maps.ndim != 4 or tuple(maps.shape[1:]) != expected:
            raise UserError(f"maps are {tuple(maps.shape[1:])} each, the projector was made for {expected}")

    def base_side(self, maps: Tensor) -> BranchOutput:
        """Identity and base branch together."""
        self.check(maps)
        out = self.base(maps)
        return BranchOutput(self.residual(maps.mean(dim=(2, 3))) + out.mu, out.gate, out.params)

    @torch.no_grad()
    def frozen_output(self, maps: Tensor) -> Tensor:
        """The base side's part (b, d) of the embedding, to be kept while the base side is frozen."""
        return self.base_side(maps).mu

    def forward(self, maps: Tensor, frozen: Tensor | None = None, *, detach: bool = True) -> ProjectorOutput:
        """The embedding and its parts.

        Args:
            maps: the backbone's maps.
            frozen: what ``frozen_output`` gave for them; None computes it.
            detach: no gradient from the incremental branch to the maps, nor to the base side, where there is such a branch.

        Shapes: ``maps`` (b, c, H, W), ``frozen`` (b, d) -> see ``ProjectorOutput``.

        Raises:
            UserError: maps of another shape.
        """
        if self.inc is None:
            out = self.base_side(maps)
            return ProjectorOutput(out.mu, out.mu, None, out.gate, out.params)
        if frozen is None:
            frozen = self.frozen_output(maps) if detach else self.base_side(maps).mu
        else:
            self.check(maps)
        new = self.inc(maps.detach())
        return ProjectorOutput(frozen + new.mu, frozen, new.mu, new.gate, new.params)


class SSMProjector(Projector):
    """One selective branch, which is fine-tuned in each session.

    Args:
        channels: channels c of the map.
        size: height and width of the map.
        config: shape.
        residual: whether the identity is a matrix.

    Source: the single-branch ablation of Mamba-FSCIL, arXiv 2407.06136.

    Example:
        >>> SSMProjector(8, (3, 3))(torch.randn(2, 8, 3, 3)).mu.shape[0]
        2
    """


class DualSSMProjector(Projector):
    """A frozen selective branch and one for all sessions, which begins with a closed gate.

    Args:
        channels: channels c of the map.
        size: height and width of the map.
        config: shape.
        residual: whether the identity is a matrix.

    Source: Mamba-FSCIL, arXiv 2407.06136, framework figure.

    Example:
        >>> projector = DualSSMProjector(8, (3, 3))
        >>> maps = torch.randn(2, 8, 3, 3)
        >>> before = projector(maps).mu
        >>> projector.add_incremental_branch()  # its gate is closed
        >>> torch.equal(projector(maps).mu, before)
        True
    """


class MLPProjector(Projector):
    """The static projector, fine-tuned in each session, or frozen with a second one beside it.

    Args:
        channels: channels c of the map.
        size: height and width of the map.
        config: shape; its version is taken as mlp.
        residual: whether the identity is a matrix.

    Source: NC-FSCIL, arXiv 2302.03004.

    Example:
        >>> MLPProjector(8, (3, 3))(torch.randn(2, 8, 3, 3)).mu.shape[0]
        2
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        config: ProjectorConfig | None = None,
        *,
        residual: bool | None = None,
    ) -> None:
        given = config or ProjectorConfig()
        static = ProjectorConfig(version="mlp", width=given.width)
        super().__init__(channels, size, static, residual=residual)
