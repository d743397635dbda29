"""Decoding of image files: formats, headers, and the values of black and white."""
