"""The glue to mmengine: ``loop`` (exact positions and keyed draws), ``runner`` (a run folder around it), ``guard``."""
