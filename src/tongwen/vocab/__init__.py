"""Vocabulary extension: learn new pieces, add them to a tokenizer, initialise the model's new rows, and measure."""
