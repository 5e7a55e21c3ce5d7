"""The command line: `qrecipes VERB ...`."""
