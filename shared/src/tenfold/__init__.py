"""The thin library under Tenfold's packages: each module is one idea, and imports what it needs when it needs it."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["NonFiniteError", "UserError", "__version__"]

if TYPE_CHECKING:
    from tenfold.errors import NonFiniteError, UserError


def __getattr__(name: str) -> Any:
    if name in __all__:
        from tenfold import errors

        return getattr(errors, name)
    raise AttributeError(f"module 'tenfold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
