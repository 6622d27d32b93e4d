"""What talks with people. Knows only the callables that a stage hands it."""
