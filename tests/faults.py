"""The table of faults: what was done to real processes, and the tests that do it again.

``tests/run.sh --faults`` runs it.  As a pytest plugin (``-p faults``) it runs just these tests and appends a line for
each row to ``benchmarks/results/faults.jsonl``: whether it held, and the figures that its tests record with pytest's
``record_property("figure", ...)``.
"""

import ast
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
RESULTS = TESTS.parent / "benchmarks" / "results" / "faults.jsonl"

ROWS: dict[str, tuple[str, ...]] = {
    "SIGKILL at 50 random moments, each run resumed": ("train/test_kills.py::test_sigkill_at_random_moments",),
    "SIGTERM and SIGUSR2 at random moments, from the first instant to the end": (
        "train/test_kills.py::test_stopping_signals_at_random_moments",
    ),
}
"""What was done -> the tests, as FILE::FUNCTION."""


@cache
def functions(file: str) -> set[str]:
    """The functions of a test file."""
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def of_row(nodeid: str) -> list[str]:
    """The rows that a test, tests/FILE::FUNCTION[parameters], belongs to."""
    test = nodeid.partition("[")[0].removeprefix("tests/")
    return [row for row, tests in ROWS.items() if test in tests]


class _Rows:
    """Reports of the tests of each row, and the lines that they end as."""

    def __init__(self) -> None:
        self.reports: dict[str, list[pytest.TestReport]] = defaultdict(list)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if of_row(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            for row in of_row(report.nodeid):
                self.reports[row].append(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):  # one of several processes, whose reports come together in the first
            return
        from sslx import measure

        stamp = measure.stamp()
        for row, reports in self.reports.items():
            figures = [text for r in reports for name, text in r.user_properties if name == "figure"]
            record: dict[str, Any] = {
                "benchmark": "faults",
                "row": row,
                "held": all(report.outcome == "passed" for report in reports),
                "figures": figures,
                "num_tests": len(reports),
                "seconds": round(sum(report.duration for report in reports), 1),
            }
            measure.append(RESULTS, {**record, **stamp})
            sys.stdout.write(f"\n{'held  ' if record['held'] else 'FAILED'} {row}: {'; '.join(map(str, figures))}")
        sys.stdout.write("\n")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Rows(), "rows of faults")
