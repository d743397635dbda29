"""Weights of other libraries: read, recognized, renamed to timm's names, and accounted for (README.md)."""

from sslx.encoders.weights.loading import load as load
