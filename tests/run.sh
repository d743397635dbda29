#!/usr/bin/env bash
# The tests: bash tests/run.sh [--install-only | --slow | --slurm | --gpu | --faults] [pytest options].  Without any, the fast tier.
set -euo pipefail
cd "$(dirname "$0")/.."
tier="not slow and not gpu and not slurm and not soak" side_by_side=1
case "${1:-}" in
  --install-only) exec bash launch/quickstart.sh --install-only --test ;;
  --slow) tier="slow and not gpu and not slurm and not soak"; shift ;;
  --faults)  # the table of tests/faults.py; its results go to benchmarks/results/faults.jsonl
    tier="not gpu and not slurm"; shift; export PYTHONPATH="tests${PYTHONPATH:+:$PYTHONPATH}"; set -- -p faults "$@" ;;
  --slurm) tier="slurm" side_by_side=0; shift; bash slurm/local_cluster.sh install ;;
  --gpu) tier="gpu" side_by_side=0; shift ;;
esac
bash launch/quickstart.sh --install-only --test
if ((side_by_side)); then  # a process a core, of one thread: more would wait for each other
  set -- -n "$(($(nproc) < 4 ? $(nproc) : 4))" --dist worksteal "$@"
  export OMP_NUM_THREADS=1 # after nproc, which heeds it
fi
exec .venv/bin/python -m pytest -m "$tier" "$@"
