"""Merge adapters into a base, combine adapters, and verify the merged model."""
