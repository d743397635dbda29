#!/usr/bin/env bash
# The tests: bash tests/run.sh [options] [pytest options].  Without any, the fast tier.
#   --slow, --slurm, --gpu   another tier
#   --faults                 the table of tests/faults.py; its results go to benchmarks/results/faults.jsonl
#   --numerical              of the tier only what computes (NUMERICAL in tests/tiers.py)
#   --oldest                 with the oldest supported packages (tests/oldest.txt), in .venv-oldest
#   --isa NAME               as on a CPU with older instructions (tests/kit/instruction_sets.py lists the names)
#   --install-only           makes the environment and tests nothing
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE # each of a thousand processes would compile sslx and the tests again
cores=$(env -u OMP_NUM_THREADS nproc) tier="not slow and not gpu and not slurm and not soak" plugin=() numerical="" venv=.venv isa=none only=""
jobs=$((cores < 4 ? cores : 4))
while [ $# -gt 0 ]; do
  case "$1" in
    --install-only) only=1 ;;
    --slow) tier="slow and not gpu and not slurm and not soak" ;;
    --slurm) tier="slurm and not soak" jobs=0 ;;
    --gpu) tier="gpu" jobs=0 ;;
    --faults)
      tier="not gpu and not slurm" plugin=(-p faults)
      export PYTHONPATH="tests${PYTHONPATH:+:$PYTHONPATH}"
      ;;
    --numerical) numerical=" and numerical" ;;
    --oldest) venv=.venv-oldest ;;
    --isa)
      isa="${2:-}"
      shift $(($# > 1 ? 1 : 0))
      ;;
    *) break ;;
  esac
  shift
done

if [ $venv = .venv ]; then
  bash launch/quickstart.sh --install-only --test
else
  digest=$(cat pyproject.toml tests/oldest.txt | sha256sum | cut -d' ' -f1)
  if [ "$(cat $venv/.sslx 2>/dev/null)" != "$digest" ]; then
    echo "installing the oldest supported packages into $venv (about 6.5 GB the first time)"
    python=$(command -v python3.11 || command -v python3.12 || command -v python3) # numpy 1.26 has no wheels for 3.13
    [ -x $venv/bin/python ] || "$python" -m venv $venv
    pip=($venv/bin/python -m pip install --quiet --disable-pip-version-check)
    what=(--constraint tests/oldest.txt --editable ".[test]")
    { "${pip[@]}" uv && $venv/bin/uv pip install --quiet --python $venv/bin/python "${what[@]}"; } ||
      "${pip[@]}" --no-compile "${what[@]}"
    echo "$digest" >$venv/.sslx
  fi
fi
[ -n "$only" ] && exit 0
[[ "$tier" = slurm* ]] && bash slurm/local_cluster.sh install
if [ "$isa" != none ]; then
  variables=$($venv/bin/python tests/kit/instruction_sets.py "$isa")
  while IFS= read -r variable; do export "${variable?}"; done <<<"$variables"
fi
if ((jobs)); then # processes of one thread: more would wait for each other
  set -- -n $jobs --dist worksteal "$@"
  export OMP_NUM_THREADS=1
fi
exec $venv/bin/python -m pytest ${plugin[@]+"${plugin[@]}"} -m "$tier$numerical" "$@"
