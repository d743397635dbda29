#!/usr/bin/env bash
# Install sslx, then train, probe and plot an encoder, starting from a bare machine: bash launch/quickstart.sh
# The environment is .venv beside the project, which later calls reuse.  --install-only stops after the installation;
# --test adds what the tests need.  Everything after -- is passed to the training command.
set -euo pipefail
cd "$(dirname "$0")/.."

extra="" only=""
while [ $# -gt 0 ]; do
  case "$1" in
    --install-only) only=1 ;;
    --test) extra="[test]" ;;
    --) shift; break ;;
    *) echo "error: quickstart.sh takes --install-only, --test and -- TRAINING_FLAGS, not $1" >&2; exit 64 ;;
  esac
  shift
done

python=""
for candidate in python3.13 python3.12 python3.11 python3; do
  if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "error: Python 3.11 to 3.13 not found: apt-get install python3 python3-venv" >&2
  exit 69
fi
if [ ! -x .venv/bin/python ] && ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  echo "error: $python has no venv module: apt-get install python3-venv" >&2
  exit 69
fi
command -v "${CXX:-g++}" >/dev/null || echo "note: no C++ compiler; torch.compile on the CPU needs one: apt-get install g++ python3-dev" >&2

# The digest of pyproject.toml marks a completed installation of its requirements.
stamp=".venv/.sslx$extra"
digest=$(sha256sum pyproject.toml | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" != "$digest" ]; then
  echo "installing sslx$extra into .venv (about 6.5 GB the first time, 1 to 10 minutes)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  # uv takes a fifth of pip's time, but does not know the index of a company that pip's configuration names.
  pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
  { "${pip[@]}" uv && .venv/bin/uv pip install --quiet --python .venv/bin/python --editable ".$extra"; } 2>/dev/null ||
    "${pip[@]}" --editable ".$extra"
  echo "$digest" >"$stamp"
fi
[ -n "$only" ] && exit 0

run=runs/quickstart
cores=$(env -u OMP_NUM_THREADS nproc)
# One rank per GPU, or two ranks that share the cores without a GPU.
ranks=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count() or 2)')
export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
.venv/bin/torchrun --standalone --nproc-per-node "$ranks" launch/pretrain.py simclr_digits \
  --name quickstart --resume auto "$@"
.venv/bin/sslx probe "$run"
.venv/bin/sslx plot "$run"
echo "next, on your own images: .venv/bin/sslx pretrain --source.root YOUR_IMAGES   (.venv/bin/sslx pretrain --help)"
