"""The room of the vocabulary: learn new pieces, put them into a tokenizer, grow the model's rows, and measure."""
