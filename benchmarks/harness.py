"""The harness of all benchmarks: their options, and their records in results/.

A benchmark is a function in a file ``bench_NAME.py``, whose docstring is its help:

    @benchmark(option("--size", type=int, default=224), windows=5, seconds=8.0)
    def run(session: Session) -> None:
        ...
        session.record(size=session.options.size, samples_per_s=rates)

A benchmark returns False if a limit was missed, and ``run.py`` then exits with 1.
"""

import argparse
import ast
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from sslx.bench import measure

FOLDER = Path(__file__).parent
RUNNER = FOLDER / "run.py"
Record = dict[str, Any]
Option = Callable[[argparse.ArgumentParser], object]


def option(*names: str, **settings: Any) -> Option:
    """An option of a benchmark, with the arguments of ``ArgumentParser.add_argument``."""
    return lambda parser: parser.add_argument(*names, **settings)


@dataclass
class Session:
    """One call of a benchmark.

    flags: what is left for ``sslx pretrain``, in benchmarks that pass flags on.
    """

    name: str
    options: argparse.Namespace
    flags: list[str]
    _load_before: float = field(default_factory=lambda: os.getloadavg()[0])

    def recorded(self, **key: Any) -> list[Record]:
        """The lines of the results file that have these values, oldest first."""
        path: Path = self.options.results
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for record in map(json.loads, lines) if record.items() >= key.items()]

    def record(self, **figures: Any) -> Record:
        """Append a line with these figures, hardware, versions and commit, unless ``--no-record`` is set."""
        record = {"benchmark": self.name, "load_before": round(self._load_before, 2), **figures}
        if not self.options.no_record:
            measure.append(self.options.results, record)
        self._load_before = os.getloadavg()[0]
        return record

    def part(self, key: Record, measure_part: Callable[[], Record]) -> Record:
        """The newest line with the values of ``key``; if there is none, measure the part and record it."""
        if lines := self.recorded(**key):
            return lines[-1]
        return self.record(**{**key, **measure_part()})


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as ``run.py`` calls it."""

    function: Callable[[Session], bool | None]
    options: tuple[Option, ...]
    passes_flags: bool


def benchmark(
    *options: Option, windows: int | None = None, seconds: float | None = None, passes_flags: bool = False
) -> Callable[[Callable[[Session], bool | None]], Benchmark]:
    """Declare a benchmark.

    windows, seconds: defaults of ``--windows`` and ``--seconds``; None leaves the option out.  passes_flags: options
    that are not the benchmark's are those of ``sslx pretrain``.
    """
    if windows is not None:
        options += (option("--windows", type=int, default=windows, help="number of windows that count"),)
    if seconds is not None:
        options += (option("--seconds", type=float, default=seconds, help="length of a window"),)
    return lambda function: Benchmark(function, options, passes_flags)


def digest(settings: Mapping[str, Any]) -> str:
    """A short digest of settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def summaries() -> dict[str, str]:
    """The first line of each benchmark's docstring, by name."""
    texts = {path.stem.removeprefix("bench_"): path.read_text() for path in sorted(FOLDER.glob("bench_*.py"))}
    return {name: (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0] for name, text in texts.items()}


def main(argv: list[str]) -> int:
    """Run the benchmark that ``argv`` names; return the exit code."""
    known = summaries()
    if not argv or argv[0] not in known:
        print("usage: python benchmarks/run.py NAME [OPTIONS]; NAME --help explains a benchmark\n")
        print("\n".join(f"  {name:18} {summary}" for name, summary in known.items()))
        return 0 if not argv or argv[0] in ("-h", "--help") else 64
    name, *rest = argv
    module = import_module(f"bench_{name}")
    declared: Benchmark = module.run
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"run.py {name}", None, module.__doc__, formatter_class=raw, allow_abbrev=False)
    for add in declared.options:
        add(parser)
    results = FOLDER / "results" / f"{name}.jsonl"
    parser.add_argument("--results", type=Path, default=results, help="file to append to (default: results/NAME.jsonl)")
    parser.add_argument("--no-record", action="store_true", help="only print the figures")
    options, flags = parser.parse_known_args(rest)
    if flags and not declared.passes_flags:
        parser.error(f"unknown options: {' '.join(flags)}")
    return int(declared.function(Session(name, options, flags)) is False)
