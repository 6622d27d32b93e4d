"""The command line: one command, one file.

A command's module has `summary()` (its line of help), `add_arguments(parser)` and `run(arguments)` (its exit code). It imports
what it calls inside `run`, so that `tongwen --help` stays light.
"""
