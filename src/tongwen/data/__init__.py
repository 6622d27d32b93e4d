"""Data: where rows come from, what they mean, what is kept, and how they become tokens."""
