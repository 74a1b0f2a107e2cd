"""What `nox -s sweep` tries genview with: ratios as the authors' code writes them."""

from pathlib import Path


def write(folder: Path) -> None:
    """``ratios.txt``, of the pictures in ``photos/val``."""
    names = sorted(path.relative_to(folder / "photos/val") for path in (folder / "photos/val").rglob("*.png"))
    lines = [f"/data/{name.as_posix()} {(i + 1) / (len(names) + 1):.3f}\n" for i, name in enumerate(names)]
    (folder / "ratios.txt").write_text("".join(lines), encoding="utf-8")
