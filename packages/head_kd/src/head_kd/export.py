"""The plain student out of a checkpoint: two files that stock mmdet loads as if nothing had happened."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from head_kd.checkpoints import read_weights, student_weights
from head_kd.configs import resolve_config
from head_kd.stack import build, start
from tenfold import UserError, checkpoints
from tenfold.files import replacing

METHOD = "head_kd.student"


def export_student(
    checkpoint: str | Path,
    student: Any,
    out: str | Path,
    *,
    classes: tuple[str, ...] | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Write the plain student of a checkpoint as ``.safetensors`` and ``.pth`` that stock mmdet loads strictly.

    Args:
        checkpoint: checkpoint of a run (``checkpoints/last.ckpt``), or any of ``HEADDetector``'s.
        student: config of the plain student.
        out: path without suffix.
        classes: class names for the header; default: the checkpoint's.
        verify: load both files into a fresh student and compare its outputs bit for bit with the checkpoint's.

    Returns:
        numbers of tensors kept and left out, and ``verified``.

    Raises:
        UserError: the checkpoint does not hold this student; the first keys or shapes that differ are named.
    """
    start()
    cfg = resolve_config(student)
    weights = read_weights(checkpoint)
    own = student_weights(weights.state_dict)
    plain = build(cfg.model)
    checkpoints.check_shapes(checkpoint, {k: tuple(v.shape) for k, v in plain.state_dict().items()}, own)
    plain.load_state_dict(own)
    names = classes or weights.classes
    out = Path(out)
    header = {"classes": list(names) if names else None, "model": str(cfg.model.get("type"))}
    checkpoints.save(out.with_suffix(".safetensors"), own, method=METHOD, config=header)
    with replacing(out.with_suffix(".pth")) as temporary:
        meta = {"dataset_meta": {"classes": tuple(names)}} if names else {}
        torch.save({"meta": meta, "state_dict": own}, temporary)
    report = {"kept": len(own), "left_out": len(weights.state_dict) - len(own), "verified": None}
    if verify:
        report["verified"] = _same_outputs(plain, out, cfg)
        if not report["verified"]:
            raise UserError(f"{out}: the exported files do not give the checkpoint's outputs")
    return report


def _same_outputs(plain: Any, out: Path, cfg: Any) -> bool:
    """Whether both files give the maps and the head's outputs of ``plain`` on an image of noise."""
    image = torch.randn((1, 3, 128, 160), generator=torch.Generator().manual_seed(0))
    expected = _outputs(plain, image)
    for suffix in (".safetensors", ".pth"):
        fresh = build(cfg.model)
        fresh.load_state_dict(read_weights(out.with_suffix(suffix)).state_dict, strict=True)
        if not all(torch.equal(a, b) for a, b in zip(expected, _outputs(fresh, image), strict=True)):
            return False
    return True


@torch.no_grad()
def _outputs(detector: Any, image: Tensor) -> list[Tensor]:
    detector.eval()
    maps = detector.extract_feat(image)
    head = detector.bbox_head if hasattr(detector, "bbox_head") else detector.rpn_head
    return [*maps, *head(maps)[0]]
