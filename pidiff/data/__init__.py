"""Training data: synthetic people with exactly known factors, or a folder of pictures."""
