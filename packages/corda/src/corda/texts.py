"""Text that ships with Python, for calibration and demonstration without a file: source code, and names of characters."""

import sys
import sysconfig
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from tenfold import UserError
from tenfold.datasets import Text
from tenfold.errors import did_you_mean


def standard_library_code(
    modules: Sequence[str] = ("argparse", "ast", "csv", "datetime", "inspect", "tarfile"),
) -> Text:
    """Source code of modules of the standard library, joined by blank lines in the order given; real.

    Raises:
        UserError: a name that is not a module of the standard library with one Python file of its own.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for name in modules:
        path = folder / f"{name.replace('.', '/')}.py"
        if name.partition(".")[0] not in sys.stdlib_module_names or not path.is_file():
            near = did_you_mean(name, sys.stdlib_module_names)
            raise UserError(f"'{name}' is no module of one Python file in the standard library: {near}")
        texts.append(path.read_text(encoding="utf-8"))
    return Text("\n\n".join(texts), f"source of the standard library ({', '.join(modules)}; shipped with Python)")


def unicode_names(first: int = 0x0370, count: int = 256) -> Text:
    """Facts, one per line, real: ``U+0416 -> CYRILLIC CAPITAL LETTER ZHE``.

    Args:
        first: code point to begin at (0x0370: Greek, then Cyrillic).
        count: number of characters; code points without a name are passed over.

    Raises:
        UserError: fewer than ``count`` names from there on.
    """
    lines: list[str] = []
    for code in range(first, sys.maxunicode + 1):
        if len(lines) == count:
            break
        if name := unicodedata.name(chr(code), None):
            lines.append(f"U+{code:04X} -> {name}")
    if len(lines) != count or count < 1:
        raise UserError(f"count must be 1 to the {len(lines)} names from U+{first:04X} on, got {count}")
    return Text("\n".join(lines), f"unicodedata {unicodedata.unidata_version} (shipped with Python)")
