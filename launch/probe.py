"""Probe a run's encoder.  torchrun --nproc-per-node 8 launch/probe.py runs/simclr_cifar10"""

import sys

from sslx.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["probe", *sys.argv[1:]]))
