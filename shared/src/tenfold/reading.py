"""How folders of pictures are read: settings for the commands of several packages; no torch and no NumPy."""

from dataclasses import dataclass

from tenfold.config import Settings


@dataclass(frozen=True, kw_only=True)
class Reading(Settings):
    """How image files are read.

    Args:
        verify: decode every picture before the work begins, so that broken ones are found at once, all together.
        skip_bad: leave out pictures that cannot be decoded, and count them; implies verify.
        follow_links: read pictures that links lead to outside of the data's own folder.
    """

    verify: bool = False
    skip_bad: bool = False
    follow_links: bool = False
