"""Training data, made on the fly: a sample follows from a seed and its number alone."""
