"""Faster attention, projections, LoRA and loss with the same results."""
