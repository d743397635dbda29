"""Image files as pixels: which formats there are, what a file says of itself, and what black and white are in it."""
