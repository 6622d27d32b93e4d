"""What a command does when it is not a stage of a recipe."""
