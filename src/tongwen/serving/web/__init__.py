"""The bench in the browser: each tab a file, and a door before all of them. Knows only the callables of a `Bench`."""
