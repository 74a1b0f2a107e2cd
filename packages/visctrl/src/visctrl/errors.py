"""What can go wrong in an edit that its user can mend, by name."""

from tenfold import UserError


class UnsupportedModelError(UserError):
    """The model has no self-attention that can be controlled, or has it in a form that is not known; the message says which."""


class BankMismatchError(UserError):
    """Features or a trajectory of another model, schedule or size than the one that is at work."""


class MissingFeaturesError(UserError):
    """Injection was asked for at a timestep or in a layer of which nothing was recorded."""


class ShapeMismatchError(UserError):
    """Reference and target, or picture and mask, do not fit each other."""


class AttachedError(UserError, RuntimeError):
    """A controller or a model is under control already."""


class DivergedError(UserError, FloatingPointError):
    """The network gave NaN or infinity; the message names the level."""
