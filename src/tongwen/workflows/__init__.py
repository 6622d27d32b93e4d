"""Jobs that several packages share in: the pipeline, training, tokenized data, evaluation, the chat model."""
