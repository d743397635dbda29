#!/usr/bin/env bash
# The READMEs' figures, on this machine:
#   bash benchmarks/run_cpu.sh --quick CIFAR10 PHOTOS    throughput and memory, under 40 minutes on 2 cores
#   bash benchmarks/run_cpu.sh CIFAR10 PHOTOS            and accuracies, 6 hours more, as parts: started again it goes on
# CIFAR10: a folder with train/CLASS/* and test/CLASS/*.  PHOTOS: a folder of photos.  Both end with the READMEs written.
set -euo pipefail
quick=0
if [[ ${1:-} == --quick ]]; then quick=1; shift; fi
if (($# != 2)); then sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 64; fi
cifar=$(realpath "$1") photos=$(realpath "$2") start=$SECONDS failed=()
cd "$(dirname "$0")/.."
.venv/bin/python -c 'import lightly' 2>/dev/null || { echo "error: the peers are missing: .venv/bin/pip install -e '.[bench]'" >&2; exit 69; }
images=(--source.name folder --source.root "$cifar")

run() {  # a benchmark that misses its limit does not keep the others from running
  echo "== $* ($(((SECONDS - start) / 60)) min)"
  .venv/bin/python "benchmarks/$@" || failed+=("$1")
}

run bench_harness.py
run bench_startup.py --runs 3
run bench_loader.py --root "$cifar/train" --size 32 --seconds 4 --windows 3
run bench_loader.py --root "$photos" --size 224 --seconds 4 --batch-size 32 --windows 3
run bench_nt_xent.py --seconds 1 --windows 3
run bench_nt_xent.py --batch-sizes 2 8 16 32 64 128 256 --seconds 0.4 --windows 9 --no-compile --memory-at \
  --results benchmarks/results/nt_xent_small.jsonl
run bench_step.py simclr_cifar10_cpu "${images[@]}" --windows 5 --beside "--compile off" --images "CIFAR-10 (JPEG q75)"
run bench_peers.py --root "$cifar" --windows 3 --seconds 8
run bench_scaling.py --rounds 2 --window-steps 5 --windows 3 simclr_cifar10_cpu --source.name synthetic --data.backend synthetic
if ((!quick)); then
  run bench_quickstart.py
  run bench_parity.py --root "$cifar/test" --size 32
  run bench_parity.py --root "$photos" --size 224
  run bench_accuracy.py simclr_cifar10_6min "${images[@]}" --limit-s 360 --linear-at-least 0.60
  run bench_methods.py --root "$cifar"
  run bench_photos.py --root "$cifar/train" --each 200 --what "2,000 CIFAR-10 images" --narrow -- --epochs 15
  run bench_photos.py --narrow -- --epochs 15
  run bench_time_to_accuracy.py --root "$cifar"
fi
.venv/bin/python benchmarks/report.py
echo "took $(((SECONDS - start) / 60)) minutes"
if ((${#failed[@]})); then echo "missed their limits: ${failed[*]}" >&2; exit 1; fi
