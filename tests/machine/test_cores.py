"""A process's share of the cores, on a laptop and as Slurm binds its tasks or does not."""

import pytest

from sslx.machine import cores


@pytest.mark.parametrize(
    ("allowed", "node", "processes", "expected"),
    [
        (8, None, 2, 4),  # a laptop
        (2, None, 4, 1),
        (48, 48, 8, 6),  # a node of Slurm's whose tasks may run anywhere
        (6, 48, 8, 6),  # bound to six cores each: not divided again
        (48, 16, 4, 4),  # a part of a node, not held to it
    ],
)
def test_share(monkeypatch: pytest.MonkeyPatch, allowed: int, node: int | None, processes: int, expected: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(allowed)))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    if node is not None:
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", str(node))
    assert cores.per_process(processes) == expected
