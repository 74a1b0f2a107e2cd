"""The thin library under Tenfold's packages: each module is one idea, and imports what it needs when it needs it.

In the order in which a package needs them: ``config`` (settings and their ranges), ``cli`` (a command line out of them),
``runs`` (a folder of results), ``readers``, ``images`` and ``datasets`` (data), ``models`` and ``checkpoints`` (models by
name, weights from files), ``randomness`` (keyed draws), ``training`` (exact resume), ``claims`` (arms x seeds, decided),
``figures`` and ``report`` (what people look at), ``export``, ``growing`` (what many commands add to), ``bench``, ``testing``.
"""

from typing import TYPE_CHECKING

from tenfold.lazy import attach

if TYPE_CHECKING:
    from tenfold.errors import NonFiniteError as NonFiniteError
    from tenfold.errors import UserError as UserError

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = attach(__name__)
