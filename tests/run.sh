#!/usr/bin/env bash
# The tests: bash tests/run.sh [--install-only | --slow | --slurm | --gpu] [pytest options].  Without any, the fast tier.
set -euo pipefail
cd "$(dirname "$0")/.."
tier="not slow and not gpu and not slurm"
case "${1:-}" in
  --install-only) exec bash launch/quickstart.sh --install-only --test ;;
  --slow) tier="slow and not gpu and not slurm"; shift ;;
  --slurm) tier="slurm"; shift; bash slurm/local_cluster.sh install ;;
  --gpu) tier="gpu"; shift ;;
esac
bash launch/quickstart.sh --install-only --test
exec .venv/bin/python -m pytest -m "$tier" "$@"
