"""One module per verb of the command line; only `App` imports them, when their verb runs."""
