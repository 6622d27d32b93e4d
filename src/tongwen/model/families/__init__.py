"""Models of families that transformers does not have itself, each in a package that registers it on import."""
