"""Run one benchmark: ``python benchmarks/run.py NAME [OPTIONS]``.  Without a name, list them all."""

import sys

import harness

if __name__ == "__main__":
    sys.exit(harness.main(sys.argv[1:]))
