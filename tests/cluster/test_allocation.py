"""What a job asks for, and what cannot be asked for."""

import pytest

from sslx.cluster.allocation import Config
from sslx.errors import ConfigError


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("90", 90), ("30:01", 31), ("2:00:00", 120), ("1-12", 2160), ("1-0:30", 1470), ("7-00:00:00", 10_080)],
)
def test_times_are_read_as_slurm_reads_them(time: str, minutes: int) -> None:
    assert Config(time=time).minutes == minutes


def test_ranks_are_gpus_unless_said() -> None:
    assert Config().ranks == 1
    assert Config(gpus_per_node=8).ranks == 8
    assert Config(gpus_per_node=8, ranks_per_node=4).ranks == 4
    assert Config(ranks_per_node=3).ranks == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"time": "soon"}, "D-HH:MM:SS, not 'soon'"),
        ({"time": "2"}, "--time 2 must be longer than --signal-delay-s 120"),
        ({"give_up_s": 120}, "--give-up-s must be between 0 and --signal-delay-s 120"),
        ({"nodes": 0}, "--nodes must be at least 1, not 0"),
        ({"ranks_per_node": 0}, "--ranks-per-node must be at least 1, not 0"),
        ({"gpus_per_node": 2, "ranks_per_node": 3}, "--ranks-per-node must be at most --gpus-per-node 2, not 3"),
    ],
)
def test_what_cannot_be(given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(**given)  # pyright: ignore[reportArgumentType]
