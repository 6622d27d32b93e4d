"""The work of the commands that are not stages of a recipe."""
