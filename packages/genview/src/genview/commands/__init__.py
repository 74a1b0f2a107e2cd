"""The verbs of the command line, one file each; ``tenfold.cli.App`` imports a file when its verb runs."""
