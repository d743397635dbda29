"""Pretrain an encoder.  torchrun --nproc-per-node 8 launch/pretrain.py simclr_cifar10 --optim.lr 0.3"""

import sys

from sslx.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
