"""`genview demo`."""
