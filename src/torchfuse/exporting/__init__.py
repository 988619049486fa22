"""A model to a file and back, and what the file says of how it came to be."""
