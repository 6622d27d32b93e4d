"""Inference: ids in, text out, whole characters only."""
