"""The workbench in the browser: a module for each tab, behind a login. It only calls the callables of a `PageBackend`."""
