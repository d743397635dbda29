#!/usr/bin/env bash
# The tests: bash tests/run.sh [--install-only | --slow] [pytest options].  Without --slow, the fast tier.
set -euo pipefail
cd "$(dirname "$0")/.."
tier="not slow and not gpu"
case "${1:-}" in
  --install-only) exec bash launch/quickstart.sh --install-only --test ;;
  --slow) tier="slow and not gpu"; shift ;;
  --gpu) tier="gpu"; shift ;;
esac
bash launch/quickstart.sh --install-only --test
exec .venv/bin/python -m pytest -m "$tier" "$@"
