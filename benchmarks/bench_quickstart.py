"""Time the README's first command with everything installed, and record the table that it ends with.

    python benchmarks/run.py quickstart                    (under three minutes)

Training time counts from the creation of the run folder to the last step.
"""

import json
import shutil
import subprocess
import time
from pathlib import Path

from harness import FOLDER, Session, benchmark

ROOT = Path(__file__).parents[1]
LIMIT_S = 120


@benchmark()
def run(session: Session) -> bool:
    folder = ROOT / "runs" / "quickstart"
    shutil.rmtree(folder, ignore_errors=True)
    start = time.time()
    subprocess.run(["bash", "launch/quickstart.sh"], cwd=ROOT, check=True)
    command_s = time.time() - start
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    train_s = last["time"] - (folder / "config.json").stat().st_mtime
    probed = json.loads((folder / "probe.json").read_text())
    session.record(command_s=round(command_s, 1), train_s=round(train_s, 1), **probed)
    if not session.options.no_record:
        shutil.copy(folder / "tsne.png", FOLDER / "results" / "quickstart_tsne.png")
    print(f"trained in {train_s:.0f} s (limit {LIMIT_S} s), the whole command took {command_s:.0f} s")
    return train_s <= LIMIT_S
