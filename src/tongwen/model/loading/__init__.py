"""Load published models: weights, tokenizers, special tokens, devices."""
