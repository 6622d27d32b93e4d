"""The bench in the browser: each tab a file, and a gate before all of them. Knows only the callables of a `Bench`."""
