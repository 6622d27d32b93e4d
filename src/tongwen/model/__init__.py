"""Models: opened, adapted, folded, named by their fingerprint, and scored in bits per byte."""
