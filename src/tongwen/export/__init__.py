"""What leaves the house: a model in the forms that other programs read, each checked by reading it back."""
