#!/usr/bin/env bash
# Measures the figures of the READMEs on this machine, and writes them there:
#   bash benchmarks/run_cpu.sh --quick CIFAR10 PHOTOS    speed and memory, under 40 minutes on two cores
#   bash benchmarks/run_cpu.sh CIFAR10 PHOTOS            accuracies too, 6 hours more; continues if started again
# CIFAR10 is a folder with train/CLASS/* and test/CLASS/*, PHOTOS any folder of photos.
set -euo pipefail
quick=0
if [[ ${1:-} == --quick ]]; then quick=1; shift; fi
if (($# != 2)); then sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 64; fi
cifar=$(realpath "$1") photos=$(realpath "$2") start=$SECONDS failed=()
cd "$(dirname "$0")/.."
.venv/bin/python -c 'import lightly' 2>/dev/null || { echo "error: the peers are missing: .venv/bin/pip install -e '.[bench]'" >&2; exit 69; }
images=(--source.name folder --source.root "$cifar")

run() {  # if a benchmark misses its limit, the others still run
  echo "== $* ($(((SECONDS - start) / 60)) min)"
  .venv/bin/python benchmarks/run.py "$@" || failed+=("$1")
}

run harness
run startup --windows 3
run loader --root "$cifar/train" --size 32 --seconds 4 --windows 3
run loader --root "$photos" --size 224 --seconds 4 --batch-size 32 --windows 3
run nt_xent --seconds 1 --windows 3
run nt_xent --batch-sizes 2 8 16 32 64 128 256 --seconds 0.4 --windows 9 --no-compile --memory-at \
  --results benchmarks/results/nt_xent_small.jsonl
run step simclr_cifar10_cpu "${images[@]}" --windows 5 --beside "--compile off" --images "CIFAR-10 (JPEG q75)"
run peers --root "$cifar" --windows 3 --seconds 8
run scaling --rounds 2 --window-steps 5 --windows 2 simclr_cifar10_cpu --source.name synthetic --data.backend synthetic
if ((!quick)); then
  run quickstart
  run parity --root "$cifar/test" --size 32
  run parity --root "$photos" --size 224
  run accuracy simclr_cifar10_6min "${images[@]}" --limit-s 360 --linear-at-least 0.60
  run methods --root "$cifar"
  run label_free
  run photos --root "$cifar/train" --each 200 --what "2,000 CIFAR-10 images" --narrow --epochs 15
  run photos --narrow --epochs 15
  run time_to_accuracy --root "$cifar"
fi
.venv/bin/python benchmarks/report.py
echo "took $(((SECONDS - start) / 60)) minutes"
if ((${#failed[@]})); then echo "missed their limits: ${failed[*]}" >&2; exit 1; fi
