"""Measuring speed and memory: the harness behind ``sslx bench`` and benchmarks/."""
