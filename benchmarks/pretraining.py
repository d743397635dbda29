"""``sslx pretrain`` and ``sslx probe`` in processes of their own, and the files that they leave in a run folder."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class TrainingRun:
    """A run of ``sslx pretrain`` by its folder."""

    folder: Path

    def pretrain(self, *flags: str, **environ: str) -> int:
        """Train, and return the peak of the process's resident memory, in bytes.

        If the command fails, the benchmark exits with the command's code.
        """
        place = ["--runs", str(self.folder.parent), "--name", self.folder.name]
        process = subprocess.Popen([sys.executable, "-m", "sslx", "pretrain", *flags, *place], env=os.environ | environ)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(process.returncode)
        return usage.ru_maxrss * 1024

    def probe(self, *flags: str) -> Record:
        """Probe the encoder, and return what ``probe.json`` says.

        kNN has 200 neighbors, as in all lines of results/ that were recorded before sslx chose their number.
        """
        usual = ["--probe.k", "200", "--probe.no-label-free"]
        subprocess.run([sys.executable, "-m", "sslx", "probe", str(self.folder), *usual, *flags], check=True)
        return json.loads((self.folder / "probe.json").read_text())

    def config(self) -> Record:
        """The saved config."""
        return json.loads((self.folder / "config.json").read_text())

    def metrics(self) -> list[Record]:
        """The lines of the log."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def samples_per_s(self) -> float:
        """Samples per second after the first line of the log, which includes compiling."""
        timed = [line for line in self.metrics() if "samples_per_s" in line]
        first, last = timed[0], timed[-1]
        return (last["step"] - first["step"]) * self.config()["batch_size"] / (last["time"] - first["time"])


def by_name(probed: Record) -> dict[str, Record]:
    """The kNN and linear accuracies in a ``probe.json``, by representation."""
    return {score["name"]: {"knn": score["knn"], "linear": score["linear"]} for score in probed["scores"]}
