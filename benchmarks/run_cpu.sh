#!/usr/bin/env bash
# Every figure of the README on this machine: bash benchmarks/run_cpu.sh CIFAR10_FOLDER PHOTO_FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
cifar=${1:?folder with train/CLASS/* and test/CLASS/*} photos=${2:?folder of photos}
python=.venv/bin/python
$python benchmarks/bench_quickstart.py
$python benchmarks/bench_startup.py
$python benchmarks/bench_parity.py --root "$cifar/test" --size 32
$python benchmarks/bench_parity.py --root "$photos" --size 224
$python benchmarks/bench_loader.py --root "$cifar/train" --size 32
$python benchmarks/bench_loader.py --root "$photos" --size 224
$python benchmarks/bench_nt_xent.py
$python benchmarks/bench_cifar10.py --root "$cifar"
