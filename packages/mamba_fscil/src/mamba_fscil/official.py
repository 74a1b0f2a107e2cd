"""Names of the authors' checkpoints, and ours."""

import re
from collections.abc import Mapping

from torch import Tensor

from tenfold import UserError

_RESNET12 = re.compile(r"backbone\.layer([1-4])\.0\.(?:(conv|norm|bn)([1-3])|downsample\.([01]))\.(\w+)")
"""A block of ResNet-12 has three convolutions; one of ResNet-18 has two, and keeps its names."""


def converted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of an official checkpoint under our names, and the names that have none.

    ``backbone.*`` keeps its names but for those of ResNet-12; ``neck.mlp_proj``, ``neck.pos_embed`` and ``neck.block`` become
    those of the base branch, with the suffix ``_new`` those of the incremental one; ``neck.residual_proj.proj`` is the
    residual projection, ``head.etf_vec`` the class vectors.

    Raises:
        UserError: none of the names is an official one.

    Source: the configurations and modules of Mamba-FSCIL's code; ResNet-12 of mmfewshot, which it uses.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    twelve = any(name.startswith("backbone.layer1.0.conv3.") for name in tensors)
    for name, tensor in tensors.items():
        ours = _name(name, twelve)
        if ours is None:
            unknown.append(name)
        else:
            found[ours] = tensor
    if not any(name.startswith("projector.") for name in found):
        shown = ", ".join(list(tensors)[:5])
        raise UserError(f"expected names such as neck.mlp_proj.0.weight and head.etf_vec, found {shown}")
    return found, unknown


def _part(match: re.Match[str]) -> str:
    """Our name within a block of ResNet-12."""
    if match[4] is not None:
        return f"shortcut.{match[4]}.{match[5]}"
    return f"body.{3 * (int(match[3]) - 1) + (match[2] != 'conv')}.{match[5]}"


def _name(name: str, twelve: bool) -> str | None:
    if name == "head.etf_vec":
        return "head.W"
    if twelve and (match := _RESNET12.fullmatch(name)):
        return f"backbone.blocks.{int(match[1]) - 1}.{_part(match)}"
    if name.startswith("backbone."):
        return name
    if match := re.fullmatch(r"neck\.(mlp_proj|pos_embed|block)(_new)?(\..+)?", name):
        return f"projector.{'inc' if match[2] else 'base'}.{match[1]}{match[3] or ''}"
    if match := re.fullmatch(r"neck\.residual_proj\.proj\.(weight)", name):
        return f"projector.residual.{match[1]}"
    return None
