"""The README's first command, timed with everything installed: ``python benchmarks/bench_quickstart.py``.

Records the training time (run folder made to last step), the whole command's time, and the table it ended with.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from sslx.bench import measure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIMIT_S = 120


def main() -> int:
    run = ROOT / "runs" / "quickstart"
    shutil.rmtree(run, ignore_errors=True)
    stamp, start = measure.stamp(), time.time()
    subprocess.run(["bash", "launch/quickstart.sh"], cwd=ROOT, check=True)
    whole = time.time() - start
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = lines[-1]["time"] - (run / "config.json").stat().st_mtime
    found = json.loads((run / "probe.json").read_text())
    record = {"benchmark": "quickstart", "command_s": round(whole, 1), "train_s": round(train, 1), **found}
    measure.append(RESULTS / "quickstart.jsonl", {**record, "load_before": stamp["load_1min"]})
    shutil.copy(run / "tsne.png", RESULTS / "quickstart_tsne.png")
    print(f"trained in {train:.0f} s (limit {LIMIT_S}), the whole command took {whole:.0f} s")
    return int(train > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
