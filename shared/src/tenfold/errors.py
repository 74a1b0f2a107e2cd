"""What the user can mend, and how to say it in one line."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A fault that the user can mend: the command line prints it as one line and exits with 2.

    The message says what is wrong, where (file, line, field), what was expected; for a typo, the nearest valid names.
    """


class NonFiniteError(UserError, FloatingPointError):
    """NaN or infinity, caught where it arises; the message names the layer, the metric or the file."""


class MissingExtraError(UserError, ImportError):
    """A feature was used whose optional dependency is not installed; the message holds the command that installs it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of a message about an unknown name: its nearest valid names, or all where none is near.

    The last part of a dotted name counts too, so that ``ranck`` leads to ``init.rank``.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    if not near:
        last = difflib.get_close_matches(name.strip("-").rpartition(".")[2], {k.rpartition(".")[2] for k in known}, n=3)
        near = [k for k in known if k.rpartition(".")[2] in last]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(known)}" if known else "none is known"
