"""One file per verb; only the command line imports them, each when its verb runs."""
