"""Faster forms of attention, projections, LoRA and the loss, with the same numbers."""
