#!/usr/bin/env bash
# Runs the tests and benchmarks that need a GPU, and prints one table of them:
#   bash benchmarks/run_gpu.sh DIR [OPTIONS OF gpu_suite.py]
# DIR has the images: DIR/cifar10 and DIR/photos, each with train/CLASS/* and test/CLASS/*.  Parts whose images are not
# there are left out.  Finished parts stay in benchmarks/results/gpu: started again, it continues.  For a machine that is
# lent for eight minutes, add --for-s 460.
set -euo pipefail
if (($# < 1)) || [[ ! -d $1 ]]; then sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 64; fi
images=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || python=python3
suite=("$python" benchmarks/gpu_suite.py)
for name in cifar10 photos; do
  if [[ -d $images/$name ]]; then suite+=("--${name%10}" "$images/$name"); fi
done
code=75
for ((try = 0; try < 4 && code == 75; try++)); do # a part that trains continues where it stopped
  code=0
  "${suite[@]}" "$@" || code=$?
  if [[ " $* " == *" --for-s "* ]]; then break; fi
done
"${suite[@]}" "$@" --table
exit "$code"
