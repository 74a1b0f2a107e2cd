"""Distil a detector into one of another kind: assistant heads (HEAD and TF-HEAD) for mmdet 3.x."""
__version__ = "0.1.0"
__all__ = ["__version__"]
