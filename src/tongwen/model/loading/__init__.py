"""Opening what others publish: weights, tokenizers, special tokens, devices."""
