"""The stages of a recipe, one module each: the settings, the early check, and the job in `workflows` that it runs."""
