"""Encoders in the formats of other libraries: one file for each target, found by its name (README.md)."""
