"""Dialogues that another model writes."""
