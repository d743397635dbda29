"""Check that the ranks of a run agree: on settings, code, versions, data and weights.

A rank that was started differently would silently train something else, or leave the others waiting in a collective.
At the start, the check takes a round of small messages over the hosts; before a save, a digest of the weights on their
device.
"""

import hashlib
import json
import platform
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from sslx import __version__, distributed
from sslx.config import PretrainConfig
from sslx.console.words import first_of
from sslx.data import Loader
from sslx.encoders.sync_bn import SyncBatchNorm
from sslx.errors import ConfigError, RanksError
from sslx.machine import proc
from sslx.machine.code_version import source_digest
from sslx.train import resuming

MAY_DIFFER = (
    "runs",
    "ranks",
    "source.root",
    "source.test_root",
    "source.base",
    "source.cache",
    "source.cache_gb",
    "source.download",
    "data.threads",
    "data.prefetch",
)
"""Settings that may differ between ranks on several machines: paths, and properties of a machine."""
_LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
_FACTOR = 0x5851F42D4C957F2D


@dataclass(frozen=True)
class Peers:
    """All ranks: the host of each, and whether all use the same kind of processor and so compute the same bits."""

    hosts: tuple[str, ...]
    have_equal_processors: bool


def check_start(settings: PretrainConfig, device: torch.device) -> Peers:
    """Return who the ranks are.  Raise ConfigError on all of them, with the details, if settings or versions differ.

    This comes before anything else that ranks do together: waiting for a rank with other settings may take forever.
    """
    facts = {
        "sslx": f"{__version__} {source_digest()}",
        "Python": platform.python_version(),
        "the kind of device": device.type,
    }
    facts |= {name: version for name in _LIBRARIES if (version := _version(name))}
    values = resuming.leaves(replace(settings, unset=()))
    for name in sorted(values, key=lambda name: name in settings.unset):  # options set by the user explain the others
        if not any(name == prefix or name.startswith(prefix + ".") for prefix in MAY_DIFFER):
            facts[f"--{name.replace('_', '-')}"] = json.dumps(values[name])
    check(facts, "start all ranks by the same command, with the same installation")
    machines = distributed.gather_objects((socket.gethostname(), _processor(device)))
    return Peers(tuple(host for host, _ in machines), len({processor for _, processor in machines}) == 1)


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = proc.read("cpuinfo").splitlines()
    models = sorted({line for line in lines if line.startswith(("model name", "CPU part"))})
    return f"{models} {torch.backends.cpu.get_cpu_capability()}"


def check_parts(loader: Loader, method: nn.Module, dtype: torch.dtype) -> None:
    """Raise ConfigError on all ranks if images, parameters or precision differ.  Call before DDP is built."""
    state = loader.state_dict()
    images: Mapping[str, Any] = state["images"]
    facts = {"the number of images": f"{state['num_samples']:,}", "the images (digest)": images["digest"]}
    if "contents" in images:
        facts["the contents of some images (digest)"] = hashlib.sha256(images["contents"].numpy()).hexdigest()[:16]
    facts["the precision"] = str(dtype)
    facts |= {f"parameter {name}": f"{tuple(p.shape)} {p.dtype}" for name, p in method.named_parameters()}
    check(facts, "every rank needs the same images and builds the same model")


def check(facts: Mapping[str, str], advice: str) -> None:
    """Raise ConfigError on all ranks if their facts differ, with the values, ranks and hosts."""
    digest = hashlib.sha256(json.dumps(dict(facts)).encode()).hexdigest()
    if len(set(distributed.gather_objects(digest))) == 1:
        return
    all_facts = distributed.gather_objects((socket.gethostname(), dict(facts)))
    hosts = [host for host, _ in all_facts]
    names = dict.fromkeys(name for _, rank_facts in all_facts for name in rank_facts)
    differing: list[str] = []
    for name in names:
        values = [rank_facts.get(name, "nothing") for _, rank_facts in all_facts]
        if len(set(values)) > 1:
            differing.append(f"{name} is {_by_rank(values, hosts)}")
    more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise ConfigError(f"the ranks of this run differ: {'; '.join(differing[:3])}{more}: {advice}")


def _by_rank(values: Sequence[str], hosts: Sequence[str]) -> str:
    """Describe values by rank: ``0 on ranks 0, 2 (a, b) and 1 on rank 1 (a)``."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return " and ".join(f"{value} on {describe_ranks(ranks, hosts)}" for value, ranks in groups.items())


def describe_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Describe ranks and their hosts, or the first of them: ``ranks 0, 1 (n1, n2)``."""
    distinct_hosts = list(dict.fromkeys(hosts[rank] for rank in ranks))
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {first_of(ranks, 8)} ({first_of(distinct_hosts, 4)})"


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def check_weights(
    method: nn.Module, optimizer: torch.optim.Optimizer, step: int, peers: Peers, say: Callable[[str], None]
) -> None:
    """Raise RanksError on all ranks if one's weights or optimizer state differ from the others'.

    If the ranks have several kinds of processors, which round differently, ``say`` prints a line instead.

    Every rank calls this before a save, so that weights that have drifted apart are not saved.  The device computes a
    64-bit digest of each tensor, which reads it twice.  Values that each rank has for itself are left out: the running
    statistics of batch norms that are not synchronized.  NaN equals NaN, and 0 equals -0.
    """
    if distributed.world_size() == 1:
        return
    tensors = list(_shared(method, optimizer))
    own = _digests([tensor for _, tensor in tensors])
    whole = hashlib.sha256(json.dumps(own).encode()).hexdigest()
    if len(set(distributed.gather_objects(whole))) == 1:
        return
    all_digests = distributed.gather_objects(_digests([_canonical(tensor) for _, tensor in tensors]))
    for number, (name, _) in enumerate(tensors):
        digests = [rank_digests[number] for rank_digests in all_digests]
        common = max(digests, key=digests.count)  # rank 0's, if there are two ranks
        odd = [rank for rank, digest in enumerate(digests) if digest != common]
        if odd and peers.have_equal_processors:
            raise RanksError(
                f"{name} of {describe_ranks(odd, peers.hosts)} is no longer that of the other ranks at step {step:,}, "
                "which is not saved: continue from the last checkpoint with --resume auto, and check that machine's "
                "memory if it happens again"
            )
        if odd:
            return say(
                f"{name} of {describe_ranks(odd, peers.hosts)} is no longer, to the last bit, that of the other "
                "ranks: they compute on several kinds of processors"
            )


def _shared(method: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a checkpoint that are equal on all ranks, with their names."""
    per_rank = {
        f"{name}.{statistic}".lstrip(".")
        for name, module in method.named_modules()
        if not isinstance(module, SyncBatchNorm)
        for statistic in ("running_mean", "running_var")
    }
    for name, tensor in method.state_dict().items():
        if name not in per_rank:
            yield name, tensor
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield f"{names.get(id(parameter), 'a parameter')}'s {key}", value


def _digests(tensors: Sequence[Tensor]) -> list[int]:
    """Return a 64-bit digest of each tensor's bits, whatever its memory format, with one transfer per device."""
    digests = [_digest(tensor) for tensor in tensors]
    numbers = [0] * len(digests)
    for device in {digest.device for digest in digests}:
        places = [i for i, digest in enumerate(digests) if digest.device == device]
        values: list[int] = torch.stack([digests[i] for i in places]).tolist()  # sync point
        for place, value in zip(places, values, strict=True):
            numbers[place] = value
    return numbers


@torch.no_grad()
def _digest(x: Tensor) -> Tensor:
    if x.is_floating_point():
        kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        x = x.detach().view(kinds[x.element_size()])
    bits = x.to(torch.int64)
    return bits.sum() * _FACTOR + (bits * bits).sum()  # modulo 2**64; swapped values do not count as drift


def _canonical(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.nan, x) + 0.0 if x.is_floating_point() else x
