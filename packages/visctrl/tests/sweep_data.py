"""What `nox -s sweep` tries visctrl with: a tiny pipeline of diffusers."""

from pathlib import Path

from visctrl_tiny import sd


def write(folder: Path) -> None:
    """``model``."""
    (folder / "tokenizer").mkdir()
    sd(folder / "tokenizer").save_pretrained(folder / "model")
