"""What can go wrong with a split model, so that a caller can tell the cases apart."""

from tenfold import NonFiniteError, UserError


class UnsplittableModelError(UserError):
    """The model has no point where exactly one tensor crosses; the message says what crosses where."""


class SharedParameterError(UserError):
    """A parameter belongs to two modules, which would then both train it."""


class PlanMismatchError(UserError):
    """A plan, or a checkpoint, was made for another model or another split."""


class NonFiniteLossError(NonFiniteError):
    """The loss of a module is NaN or infinite.

    Attributes:
        module: its number, from 1 on.
        step: counted from 0.
    """

    def __init__(self, message: str, *, module: int, step: int) -> None:
        super().__init__(message)
        self.module = module
        self.step = step

    def __reduce__(self) -> tuple[object, ...]:  # it travels between processes
        return _rebuild, (str(self), self.module, self.step)


def _rebuild(message: str, module: int, step: int) -> NonFiniteLossError:
    return NonFiniteLossError(message, module=module, step=step)


class NoSecondDerivativeError(UserError, RuntimeError):
    """An operation has no second derivative, which the estimator "exact" needs."""
