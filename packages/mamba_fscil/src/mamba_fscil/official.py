"""Names of the authors' checkpoints, and ours."""

import re
from collections.abc import Mapping

from torch import Tensor

from tenfold import UserError


def converted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of an official checkpoint under our names, and the names that have none.

    ``backbone.*`` keeps its names but for ResNet-12's; ``neck.mlp_proj``, ``neck.pos_embed`` and ``neck.block`` become those
    of the base branch, with the suffix ``_new`` those of the incremental one; ``neck.residual_proj.proj`` is the residual
    projection, ``head.etf_vec`` the class vectors.

    Raises:
        UserError: none of the names is an official one.

    Source: the configurations and modules of Mamba-FSCIL's code.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        ours = _name(name)
        if ours is None:
            unknown.append(name)
        else:
            found[ours] = tensor
    if not any(name.startswith("projector.") for name in found):
        shown = ", ".join(list(tensors)[:5])
        raise UserError(f"expected names such as neck.mlp_proj.0.weight and head.etf_vec, found {shown}")
    return found, unknown


def _name(name: str) -> str | None:
    if name == "head.etf_vec":
        return "head.W"
    if name.startswith("backbone."):
        return name
    if match := re.fullmatch(r"neck\.(mlp_proj|pos_embed|block)(_new)?(\..+)?", name):
        return f"projector.{'inc' if match[2] else 'base'}.{match[1]}{match[3] or ''}"
    if match := re.fullmatch(r"neck\.residual_proj\.proj\.(weight)", name):
        return f"projector.residual.{match[1]}"
    return None
