"""Synthetic dialogues, written by another model."""
