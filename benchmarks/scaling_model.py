"""A cost model of a step's collectives on W GPUs, from NCCL's own model and vendors' nominal rates.

A collective takes latency + bytes on the wire / bandwidth.  Nominal rates are never quite reached, so times are lower
bounds and efficiencies upper bounds.  Congestion, stragglers and failures are not modeled.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """One kind of cluster.  Latencies in seconds, bandwidths in bytes/s per direction.

    gpus: GPUs per node.  within: bandwidth of a GPU's links to the others in its node.  between: bandwidth of all
    network cards of a node.  ring: latency of the start, of a step within a node, and of a step between nodes, in a
    ring; tree: the same in a double binary tree.
    """

    gpus: int
    within: float
    between: float
    ring: tuple[float, float, float]
    tree: tuple[float, float, float]


# Latencies: NCCL, src/graph/tuning.cc at 01afd20, baseLat and hwLat: Ring Simple 8.4 us, NVLINK 3.4, NET 9.6; Tree LL
# 4.4 us, NVLINK 0.52, NET 5.0 (a small message), steps as ncclTopoTuneModel counts them.
# within: 18 links of 25 GB/s a direction, NVLink 4 (NVIDIA H200 data sheet: 900 GB/s both ways together).
# between: 8 ConnectX-7 of 400 Gb/s (NVIDIA DGX H100/H200 User Guide, network modules).
H200 = Network(
    gpus=8,
    within=450e9,
    between=8 * 50e9,
    ring=(8.4e-6, 3.4e-6, 9.6e-6),
    tree=(4.4e-6, 0.52e-6, 5.0e-6),
)
WORLD_SIZES = (8, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in a step.  nbytes: size of the whole buffer that a call reduces or gathers."""

    name: str
    calls: int
    nbytes: float

    @property
    def rounds(self) -> int:
        """How often the buffer travels around a ring: twice in an all-reduce (reduce-scatter and all-gather)."""
        return 2 if "reduce" in self.name and "scatter" not in self.name else 1


def seconds(collective: Collective, world_size: int, network: Network) -> float:
    """Seconds of all calls in a step: a ring for gathering, the faster of ring and tree for reducing."""
    if world_size == 1:
        return 0.0
    nodes = math.ceil(world_size / network.gpus)
    bandwidth = network.within if nodes == 1 else min(network.within, network.between)
    start, within, between = network.ring
    hops = collective.rounds * (world_size - nodes) * within + collective.rounds * (nodes - 1) * between
    wire = collective.rounds * (world_size - 1) / world_size * collective.nbytes / bandwidth
    ring = start + hops + wire
    if collective.rounds == 1:
        return collective.calls * ring
    start, within, between = network.tree
    depth = 2 * ((world_size / nodes - 1) * within + math.log2(nodes) * between)
    return collective.calls * min(ring, start + depth + 2 * collective.nbytes / bandwidth)


def step(compute_s: float, collectives: list[Collective], world_size: int, network: Network) -> tuple[float, float]:
    """Least and most seconds of a step: with the collectives hidden behind the computation, and after it."""
    collectives_s = sum(seconds(collective, world_size, network) for collective in collectives)
    return max(compute_s, collectives_s), compute_s + collectives_s


def of_shares(name: str) -> bool:
    """Whether the buffer of a collective consists of a share of each rank: gathered, or reduced and scattered."""
    return "gather" in name or "scatter" in name


def grown(collectives: list[Collective], measured_at: int, world_size: int) -> list[Collective]:
    """The collectives of more ranks with the same batch per rank: gathered buffers grow, gradients do not."""
    factor = world_size / measured_at
    return [Collective(c.name, c.calls, c.nbytes * (factor if of_shares(c.name) else 1.0)) for c in collectives]
