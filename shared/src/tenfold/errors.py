"""What the user can mend, and how to say it in one line."""

import difflib
import importlib.util
from collections.abc import Iterable
from contextvars import ContextVar

RUNNING: ContextVar[str] = ContextVar("RUNNING", default="")
"""Distribution whose command line is running, which a message about a missing extra should name; empty in a library."""
_MANY = 20
"""Known names beyond which a message counts them instead of listing them."""


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

    The last part of a dotted name counts too, so that ``ranck`` leads to ``init.rank``. Of more than 20 names none of
    which is near, only the number is given.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    if not near:
        last = difflib.get_close_matches(name.strip("-").rpartition(".")[2], {k.rpartition(".")[2] for k in known}, n=3)
        near = [k for k in known if k.rpartition(".")[2] in last]
    if near:
        return f"did you mean {' or '.join(near)}?"
    if len(known) > _MANY:
        return f"none of the {len(known)} known names is near"
    return f"known: {', '.join(known)}" if known else "none is known"


def needs(module: str, extra: str, distribution: str = "tenfold", *, why: str = "") -> None:
    """Check that an optional dependency is installed.

    Args:
        module: top-level name of what is imported.
        extra: extra that brings it.
        distribution: distribution that has the extra. Where a command of another distribution is running that has an
            extra of the same name, the message names that one, since it is what the user installed.
        why: what the module is needed for, as the beginning of a sentence ("ONNX"); default: none.

    Raises:
        MissingExtraError: the module is not installed; the message holds the command that installs it.
    """
    if installed(module):
        return
    owner = next((name for name in (RUNNING.get(), distribution) if extra in _extras(name)), distribution)
    missing = f"{why} needs {module}, which is not installed" if why else f"{module} is not installed"
    raise MissingExtraError(f'{missing}; pip install "{owner}[{extra}]"')


def installed(module: str) -> bool:
    """Whether a top-level module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ValueError, ModuleNotFoundError):  # set to None in sys.modules, or a parent package that is not there
        return False


def _extras(distribution: str) -> list[str]:
    """The extras that an installed distribution declares."""
    import importlib.metadata  # 20 ms that no import of a package should cost

    try:
        return importlib.metadata.metadata(distribution).get_all("Provides-Extra") or []
    except (importlib.metadata.PackageNotFoundError, ValueError):  # ValueError: no name
        return []
