"""The numbers of a picture file as they stand: indices, 16 bits, and 16 bits in each of three channels."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenfold import UserError


def stored_pixels(path: Path, expected: str = "an image", *, colors: bool = False) -> NDArray[Any]:
    """The numbers of a picture file; all 16 bits of three channels, of which Pillow keeps the upper bytes alone (SYNTHIA).

    Args:
        path: the file.
        expected: what the file should be, for the message.
        colors: take the colors of a picture with a palette (a PNG of indices), not its indices.

    Raises:
        UserError: it cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            wide = image.format == "PNG" and image.mode == "RGB" and _raw_mode(image) == "RGB;16B"
            high = np.asarray(image.convert("RGB") if colors and image.mode == "P" else image)
        if not wide:
            return high
        with Image.open(path) as image:  # asked for the other order of bytes, Pillow keeps the lower ones
            codec, extents, offset, args = image.tile[0]
            rest = args[1:] if isinstance(args, tuple) else ()
            image.tile = [type(image.tile[0])(codec, extents, offset, ("RGB;16L", *rest) if rest else "RGB;16L")]
            low = np.asarray(image)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as {expected} ({' '.join(str(error).split())})") from error
    return high.astype(np.uint16) * 256 + low


def _raw_mode(image: Any) -> str:
    args = image.tile[0][3] if image.tile else ""
    return str(args[0] if isinstance(args, tuple) else args)


def turned(path: Path) -> bool:
    """Whether the camera's orientation tag turns or mirrors a picture; files of depth and labels have no such tag."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.getexif().get(0x0112, 1) in range(2, 9)
    except (OSError, SyntaxError, ValueError):  # what is wrong with the picture is said where it is read
        return False
