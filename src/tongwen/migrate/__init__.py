"""What older projects called things, and the recipe that says the same."""
