"""What `nox -s sweep` tries mamba-fscil with: a checkpoint as the authors' code writes it."""

from pathlib import Path

import torch
from test_official import checkpoint


def write(folder: Path) -> None:
    """``theirs.pth``."""
    torch.save({"state_dict": checkpoint(), "meta": {"epoch": 50}}, folder / "theirs.pth")
