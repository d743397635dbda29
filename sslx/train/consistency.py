"""Whether the ranks of a run are of one mind: the same settings, code, versions, data and weights.

A rank that was started differently would train something else in silence, or leave the others in a collective.  At the
start that costs a round of small messages over the hosts; before a save, a digest of the weights on their device.
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
from sslx.data import Loader
from sslx.encoders.sync_bn import SyncBatchNorm
from sslx.errors import ConfigError, RanksError
from sslx.machine import proc
from sslx.machine.code_version import source_digest
from sslx.train import resuming

MAY_DIFFER = ("runs", "ranks", "source.root", "source.test_root", "source.download", "data.threads")
"""Settings that ranks on several machines may have each for itself: paths, and what a machine has."""
_LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
_FIRST_ODD = 0x5851F42D4C957F2D


@dataclass(frozen=True)
class Peers:
    """All ranks: the machine of each, and whether all compute on the same kind of processor, to the same bits."""

    hosts: tuple[str, ...]
    are_alike: bool


def on_start(settings: PretrainConfig, device: torch.device) -> Peers:
    """Who the ranks are; ConfigError on all of them, by name of what differs, where settings or versions do.

    Before anything else that the ranks do together: what waits for a rank with other settings may wait for ever.
    """
    facts = {
        "sslx": f"{__version__} {source_digest()}",
        "Python": platform.python_version(),
        "the kind of device": device.type,
    }
    facts |= {name: version for name in _LIBRARIES if (version := _version(name))}
    values = resuming.leaves(replace(settings, unset=()))
    for name in sorted(values, key=lambda name: name in settings.unset):  # what was set decides what was chosen
        if not any(name == prefix or name.startswith(prefix + ".") for prefix in MAY_DIFFER):
            facts[f"--{name.replace('_', '-')}"] = json.dumps(values[name])
    check(facts, "start all ranks by the same command, with the same installation")
    every = distributed.gather_objects((socket.gethostname(), _processor(device)))
    return Peers(tuple(host for host, _ in every), len({processor for _, processor in every}) == 1)


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = proc.read("cpuinfo").splitlines()
    models = sorted({line for line in lines if line.startswith(("model name", "CPU part"))})
    return f"{models} {torch.backends.cpu.get_cpu_capability()}"


def on_parts(loader: Loader, method: nn.Module, dtype: torch.dtype) -> None:
    """ConfigError on all ranks where they have other images, parameters or another precision; before DDP is built."""
    state = loader.state_dict()
    images: Mapping[str, Any] = state["images"]
    facts = {"the number of images": f"{state['num_samples']:,}", "the images (digest)": images["digest"]}
    if "contents" in images:
        facts["the contents of some images (digest)"] = hashlib.sha256(images["contents"].numpy()).hexdigest()[:16]
    facts["the precision"] = str(dtype)
    facts |= {f"parameter {name}": f"{tuple(p.shape)} {p.dtype}" for name, p in method.named_parameters()}
    check(facts, "every rank needs the same images and builds the same model")


def check(facts: Mapping[str, str], advice: str) -> None:
    """ConfigError on all ranks where their facts differ, with their values, ranks and hosts."""
    digest = hashlib.sha256(json.dumps(dict(facts)).encode()).hexdigest()
    if len(set(distributed.gather_objects(digest))) == 1:
        return
    every = distributed.gather_objects((socket.gethostname(), dict(facts)))
    hosts = [host for host, _ in every]
    names = dict.fromkeys(name for _, own in every for name in own)
    differing: list[str] = []
    for name in names:
        values = [own.get(name, "nothing") for _, own in every]
        if len(set(values)) > 1:
            differing.append(f"{name} is {_by_rank(values, hosts)}")
    more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise ConfigError(f"the ranks of this run differ: {'; '.join(differing[:3])}{more}: {advice}")


def _by_rank(values: Sequence[str], hosts: Sequence[str]) -> str:
    """``0 on ranks 0, 2 (a, b) and 1 on rank 1 (a)``."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return " and ".join(f"{value} on {named(ranks, hosts)}" for value, ranks in groups.items())


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks and their hosts, the first of many: ``ranks 0, 1 (n1, n2)``."""
    numbers = ", ".join(map(str, ranks[:8])) + ", ..." * (len(ranks) > 8)
    there = list(dict.fromkeys(hosts[rank] for rank in ranks))
    return f"rank{'s' * (len(ranks) > 1)} {numbers} ({', '.join(there[:4])}{', ...' * (len(there) > 4)})"


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def on_weights(
    method: nn.Module, optimizer: torch.optim.Optimizer, step: int, peers: Peers, say: Callable[[str], None]
) -> None:
    """RanksError on all ranks where the weights or the optimizer's state of one are no longer those of the others.

    Where the ranks' processors are of several kinds, which round differently, ``say`` prints a line instead.

    To be called by every rank, before a save: what has drifted away is not saved.  A digest of 64 bits a tensor is
    made on the device, in two reads of it.  What each rank has for itself is left out: the running statistics of batch
    norms that are not synchronised.  NaN is equal to NaN, and 0 to -0.
    """
    if distributed.world_size() == 1:
        return
    tensors = list(_shared(method, optimizer))
    own = _digests([tensor for _, tensor in tensors])
    whole = hashlib.sha256(json.dumps(own).encode()).hexdigest()
    if len(set(distributed.gather_objects(whole))) == 1:
        return
    every = distributed.gather_objects(_digests([_canonical(tensor) for _, tensor in tensors]))
    for number, (name, _) in enumerate(tensors):
        digests = [digests[number] for digests in every]
        common = max(digests, key=digests.count)  # of two ranks, rank 0's
        odd = [rank for rank, digest in enumerate(digests) if digest != common]
        if odd and peers.are_alike:
            raise RanksError(
                f"{name} of {named(odd, peers.hosts)} is no longer that of the other ranks at step {step:,}, which is "
                "not saved: go on from the last checkpoint with --resume auto, and look at that machine's memory if "
                "it happens again"
            )
        if odd:
            return say(
                f"{name} of {named(odd, peers.hosts)} is no longer, to the last bit, that of the other ranks: they "
                "compute on several kinds of processors"
            )


def _shared(method: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds and all ranks have alike, by name."""
    own = {
        f"{name}.{statistic}".lstrip(".")
        for name, module in method.named_modules()
        if not isinstance(module, SyncBatchNorm)
        for statistic in ("running_mean", "running_var")
    }
    for name, tensor in method.state_dict().items():
        if name not in own:
            yield name, tensor
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield f"{names.get(id(parameter), 'a parameter')}'s {key}", value


def _digests(tensors: Sequence[Tensor]) -> list[int]:
    """A digest of 64 bits of each tensor's bits, whatever its memory format; one transfer from each device."""
    digests = [_digest(tensor) for tensor in tensors]
    found = [0] * len(digests)
    for device in {digest.device for digest in digests}:
        places = [i for i, digest in enumerate(digests) if digest.device == device]
        values: list[int] = torch.stack([digests[i] for i in places]).tolist()  # sync point
        for place, value in zip(places, values, strict=True):
            found[place] = value
    return found


@torch.no_grad()
def _digest(x: Tensor) -> Tensor:
    if x.is_floating_point():
        kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        x = x.detach().view(kinds[x.element_size()])
    bits = x.to(torch.int64)
    return bits.sum() * _FIRST_ODD + (bits * bits).sum()  # modulo 2**64; a swap of two values is no drift


def _canonical(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.nan, x) + 0.0 if x.is_floating_point() else x
