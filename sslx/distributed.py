"""Ranks and what they say to each other: start-up, gathers, agreement, DDP.

The only importer of ``torch.distributed``.  Every function also works on one rank without a process group,
so that no caller asks how many ranks there are.
"""

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from sslx.errors import ConfigError, DataError
from sslx.stopwatch import blocking

Group: TypeAlias = "dist.ProcessGroup | None"
Device = Literal["auto", "cpu", "cuda"]
_timeout: timedelta | None = None  # init's, for groups made later: new_group would take 30 minutes


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: its rank among all, its rank on this machine, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and talks to the user."""
        return self.rank == 0


def init(device: Device = "auto", timeout_s: float = 600.0) -> Ranks:
    """Join the ranks that torchrun or Slurm started; without either, be the only one.

    device: "auto" takes this rank's GPU where there is one.  nccl connects GPUs, gloo CPUs.
    timeout_s: how long a collective waits for the slowest rank before the job ends with an error.
    Raises ConfigError for a GPU that is not there and for an incomplete environment.
    """
    rank, world_size, local_rank = _find_ranks(os.environ)
    ranks = Ranks(rank, world_size, local_rank, _find_device(device, local_rank))
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    if world_size > 1 and not _is_up():
        global _timeout
        _timeout = timedelta(seconds=timeout_s)
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ConfigError(f"expected {name} beside RANK and WORLD_SIZE, it is not set: use torchrun")
        dist.init_process_group(
            "nccl" if ranks.device.type == "cuda" else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=_timeout,
            device_id=ranks.device if ranks.device.type == "cuda" else None,
        )
    return ranks


def joined() -> int | None:
    """This process's rank if torchrun or Slurm started it as one of several or one, else None."""
    started = "RANK" in os.environ or {"SLURM_PROCID", "SLURM_STEP_ID"} <= os.environ.keys()
    return _find_ranks(os.environ)[0] if started else None


def local_world_size() -> int:
    """Ranks on this machine, which share its cores."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if found := re.match(r"\d+", os.environ.get(name, "")):
            return max(1, int(found.group()))
    return 1


def shutdown() -> None:
    """Leave the process group, if there is one."""
    _control_group.cache_clear()
    _named.clear()
    _named[""] = None
    if _is_up():
        dist.destroy_process_group()


def _find_ranks(environ: MutableMapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's environment, else Slurm's, else (0, 1, 0).

    Under Slurm sets MASTER_ADDR and MASTER_PORT unless they are set.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", "0"))
    # A batch script has the job's SLURM_NTASKS and a SLURM_PROCID of 0 though it is alone, and so has the
    # shell of salloc: only srun's tasks have a step, and its number of tasks.
    if not {"SLURM_PROCID", "SLURM_STEP_ID"} <= environ.keys():
        return 0, 1, 0
    num_tasks = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")))
    if num_tasks > 1:
        environ.setdefault("MASTER_ADDR", _first_host(environ))
        environ.setdefault("MASTER_PORT", str(_port(environ)))
    return int(environ["SLURM_PROCID"]), num_tasks, int(environ.get("SLURM_LOCALID", "0"))


def _first_host(environ: Mapping[str, str]) -> str:
    """The first of Slurm's hosts: ``n[03-05,9],m1`` -> ``n03``.  Slurm puts task 0 there."""
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost"
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else hosts)


def _port(environ: Mapping[str, str]) -> int:
    """A port below the ephemeral ones, its own for every job and every step of a job."""
    step = int(environ.get("SLURM_STEP_ID", "0"))
    return 12_000 + (int(environ.get("SLURM_JOB_ID", "0")) + 4_099 * step) % 20_000


def _find_device(device: Device, local_rank: int) -> torch.device:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and num_gpus == 0:
        raise ConfigError("expected a CUDA GPU for device cuda, none is visible: use --device cpu or auto")
    if device == "cpu" or num_gpus == 0:
        return torch.device("cpu")
    if local_rank < num_gpus:
        return torch.device("cuda", local_rank)
    if num_gpus == 1 and "SLURM_LOCALID" in os.environ:  # --gpus-per-task: every task sees only its own
        return torch.device("cuda", 0)
    raise ConfigError(
        f"expected a GPU for each rank of a machine, got local rank {local_rank} and {num_gpus} GPU(s): "
        "start fewer ranks per machine"
    )


def _is_up() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size(group: Group = None) -> int:
    """The number of ranks in the group; 1 without a process group."""
    return dist.get_world_size(group) if _is_up() else 1


def rank(group: Group = None) -> int:
    """This process's rank in the group; 0 without a process group."""
    return dist.get_rank(group) if _is_up() else 0


_named: dict[str, Group] = {"": None}


def name_of(group: Group) -> str:
    """A string that ``group_named`` turns back into the group, for operators, which take no object."""
    if group is None:
        return ""
    _named[group.group_name] = group
    return group.group_name


def group_named(name: str) -> Group:
    """The group that ``name_of`` named."""
    return _named[name]


@functools.cache
def _control_group(group: Group) -> Group:
    """A gloo group of the same ranks for what lives on the host, so that it neither waits for a GPU nor
    mixes with the gradients.  Made at its first use, which every rank reaches."""
    members = None if group is None else dist.get_process_group_ranks(group)
    local = members is not None
    made = dist.new_group(members, _timeout, backend="gloo", use_local_synchronization=local)
    return cast("dist.ProcessGroup", made)


@blocking
def all_gather(x: Tensor, group: Group = None) -> Tensor:
    """(B, ...) on each of W ranks -> (W*B, ...), rank-major, contiguous, the same on all; no gradient."""
    x = x.detach().contiguous()
    if world_size(group) == 1:
        return x
    gathered = x.new_empty((world_size(group) * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, x, group=group)
    return gathered


def start_all_gather(x: Tensor, group: Group = None) -> Callable[[], Tensor]:
    """``all_gather`` in the background: call what it returns for the result.  x must stay as it is until then."""
    if world_size(group) == 1:
        own = x.detach().contiguous()
        return lambda: own
    x = x.detach().contiguous()
    gathered = x.new_empty((world_size(group) * x.shape[0], *x.shape[1:]))
    work = dist.all_gather_into_tensor(gathered, x, group=group, async_op=True)
    assert work is not None

    @blocking
    def wait() -> Tensor:
        work.wait()
        return gathered

    return wait


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None]:
        # pytorch#120386: a gradient that is not contiguous loses values in a collective.
        summed = grads[0].contiguous()
        own = summed.new_empty((summed.shape[0] // world_size(ctx.group), *summed.shape[1:]))
        dist.reduce_scatter_tensor(own, summed, group=ctx.group)
        return own, None


def all_gather_grad(x: Tensor, group: Group = None) -> Tensor:
    """``all_gather`` with a gradient: the sum over ranks of the gradients of this rank's slice.

    So if each rank's loss is its own share of a mean, DDP's mean over ranks is the full-batch gradient.
    """
    if world_size(group) == 1:
        return x.contiguous()
    return cast(Tensor, _AllGather.apply(x, group))


@blocking
def sum_over_ranks(x: Tensor, group: Group = None) -> Tensor:
    """The elementwise sum of every rank's x, on all ranks; no gradient; x itself stays as it was."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alike: bool, group: Group) -> Tensor:
        ctx.group, ctx.alike = group, alike
        return sum_over_ranks(x, group)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        if ctx.alike:
            return grads[0] * world_size(ctx.group), None, None
        return sum_over_ranks(grads[0], ctx.group), None, None


def sum_over_ranks_grad(x: Tensor, group: Group = None, *, alike: bool = False) -> Tensor:
    """``sum_over_ranks`` with a gradient: each rank's x gets the sum over ranks of the gradients of their sums.

    So if every rank computes the full-batch loss from such sums, DDP's mean over ranks is the full-batch gradient.
    alike: every rank makes the same of the sum and of nothing else, so the gradients are equal already, and the
    backward sends nothing.
    """
    if world_size(group) == 1:
        return x
    return cast(Tensor, _Sum.apply(x, alike, group))


def mean_over_ranks(x: Tensor, group: Group = None) -> Tensor:
    """The elementwise mean of every rank's x, on all ranks; no gradient."""
    return sum_over_ranks(x, group) / world_size(group)


@blocking
def check_same(value: int, what: str, group: Group = None) -> None:
    """Raise DataError on all ranks unless all bring the same value; a round over the hosts, none on the GPUs.

    For sizes that a collective takes on trust: nccl hangs on unequal ones, or mixes up the rows.
    """
    if world_size(group) == 1:
        return
    values = torch.empty(world_size(group), dtype=torch.int64)
    dist.all_gather_into_tensor(values, torch.tensor([value]), group=_control_group(group))
    seen: list[int] = values.tolist()
    if len(set(seen)) > 1:
        raise DataError(f"expected the same {what} on every rank, got {seen} by rank: cut the data evenly")


def broadcast_object(obj: Any, src: int = 0) -> Any:
    """Rank ``src``'s object, on all ranks (pickled)."""
    if world_size() == 1:
        return obj
    objects = [obj]
    dist.broadcast_object_list(objects, src=src, group=_control_group(None))
    return objects[0]


def gather_objects(obj: Any) -> list[Any]:
    """Every rank's object in the order of ranks, on all ranks (pickled)."""
    if world_size() == 1:
        return [obj]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, obj, group=_control_group(None))
    return objects


def barrier() -> None:
    """Wait until all ranks are here."""
    if world_size() > 1:
        dist.barrier(group=_control_group(None))


class StopFlag:
    """Agreement on when to stop: all ranks learn the largest flag at the same step, one step late.

    The flags travel over the hosts while the next step runs, so no step waits for the slowest rank.
    """

    def __init__(self, group: Group = None) -> None:
        self._group = group
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._work: dist.Work | None = None

    def agreed(self, mine: int) -> int:
        """Send this step's flag (0: go on); returns the largest of the previous call's flags, 0 at first.

        To be called once a step by every rank.  One rank alone gets its own flag back at once.
        """
        if world_size(self._group) == 1:
            return mine
        previous = self.finish()
        self._flag = torch.tensor([mine])
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=_control_group(self._group), async_op=True)
        return previous

    @blocking
    def finish(self) -> int:
        """Wait for the flags on their way, if any, and return the largest of the last call's (0: none)."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return cast(int, self._flag.tolist()[0])


def wrap(module: nn.Module, *, device: torch.device, sync_bn: bool) -> nn.Module:
    """The module in DDP, which averages gradients over ranks; on one rank the module itself.

    device: where the module's parameters are.  sync_bn: whether its batch norms are synchronised; where they
    are not, rank 0's buffers are sent to all ranks before each forward.
    """
    if world_size() == 1:
        return module
    # torch 2.15 renamed it; the old name warns, and its False leaves buffers unequal from the start.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {buffers: not sync_bn, "gradient_as_bucket_view": True}
    wrapped = DistributedDataParallel(module, [device] if device.type == "cuda" else None, **options)
    _settle_buckets(wrapped)
    return wrapped


def _settle_buckets(wrapped: DistributedDataParallel) -> None:
    """Fix DDP's gradient buckets now, by a backward of zeros.

    DDP lays them out anew, in the order of the gradients, after its first backward.  A ring sums each part of
    a bucket in another order of ranks, so with three or more the first step after a restart differed in the
    last bit from the same step of a run that went on.
    """
    module: nn.Module = wrapped.module
    own_forward = vars(module).get("forward")

    def zero(_: Tensor) -> Tensor:
        sums = [p.sum() for p in module.parameters() if p.requires_grad]
        return torch.stack([s.float() for s in sums]).sum() * 0

    module.forward = zero
    try:
        wrapped(torch.zeros(1)).backward()  # with device_ids, DDP takes no call without an argument
    finally:
        del module.forward
        if own_forward is not None:
            module.forward = own_forward
    module.zero_grad(set_to_none=True)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DDP and torch.compile, in any order."""
    while isinstance(module, DistributedDataParallel) or hasattr(module, "_orig_mod"):
        inner = module.module if isinstance(module, DistributedDataParallel) else module._orig_mod
        module = cast(nn.Module, inner)
    return module
