"""Export a model to the formats that other programs read, and check each file by reading it back."""
