"""Teach an image classifier new classes from a handful of pictures, session after session, and keep the old ones."""

__version__ = "0.1.0"
