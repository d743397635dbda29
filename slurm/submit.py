"""Submit a run to a cluster.  python slurm/submit.py --nodes 2 --gpus-per-node 8 -- simclr_cifar10 --optim.lr 0.3"""

import sys

from sslx.cli import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]]))
