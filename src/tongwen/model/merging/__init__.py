"""Folding adapters into a base, combining them, and the proof that the sum is right."""
