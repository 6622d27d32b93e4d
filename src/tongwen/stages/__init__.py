"""The stages of a recipe, one file each: its settings, what refuses it ahead of its turn, and the job of `workflows` that it runs."""
