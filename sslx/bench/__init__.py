"""Measuring: the harness behind ``sslx bench`` and benchmarks/."""
