"""Ranks and what they say to each other: start-up, gathers, agreement.

The only importer of ``torch.distributed``.  Every function also works on one rank without a process group,
so that no caller asks how many ranks there are.
"""

import functools
import os
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.autograd.function import once_differentiable

from sslx.console import activity
from sslx.errors import DataError
from sslx.machine import devices, environment, joining, limits, network
from sslx.machine.environment import joined as joined
from sslx.machine.environment import local_world_size as local_world_size
from sslx.machine.stopwatch import blocking

Group: TypeAlias = "dist.ProcessGroup | None"
# torch 2.14 renamed both; the old names, which are all that 2.11 to 2.13 have, warn there.
_NAMES = ("all_gather_single", "all_gather_into_tensor"), ("reduce_scatter_single", "reduce_scatter_tensor")
_all_gather_single, _reduce_scatter_single = (getattr(dist, new if hasattr(dist, new) else old) for new, old in _NAMES)
_WAITING = "waiting for the other ranks"
_timeout: timedelta | None = None  # init's, for groups made later: new_group would take 30 minutes


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where this process stands among all ranks and among those of its machine, and on which device it computes.

    Example: ``Ranks(device=torch.device("cpu"))`` is a process that is alone.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and talks to the user."""
        return self.rank == 0


def init(device: devices.Device = "auto", timeout_s: float | None = None, join_s: float | None = None) -> Ranks:
    """Join the ranks that torchrun or Slurm started; without either, be the only one.

    device: "auto" takes this rank's GPU where there is one.  nccl connects GPUs, gloo CPUs.
    timeout_s: how long a collective waits for the slowest rank before the job ends with an error; default:
      SSLX_STALL_S, else 600 seconds.  Those of nccl wait a minute longer, since their end is without words.
    join_s: how long to wait for the other ranks to come; default: SSLX_JOIN_S, else 300 seconds.
    Raises ConfigError for a GPU that is not there and for an incomplete or impossible environment, RanksError for
    ranks that do not come and a port that is taken.
    """
    environment.check()
    rank, world_size, local_rank = environment.ranks(os.environ)
    ranks = Ranks(
        device=devices.of_rank(device, local_rank),
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=environment.local_world_size(),
    )
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    if world_size > 1 and not _is_up():
        global _timeout, _board
        _timeout = timedelta(seconds=timeout_s or environment.seconds("SSLX_STALL_S", 600.0))
        on_gpu = ranks.device.type == "cuda"
        limit_s = join_s or environment.seconds("SSLX_JOIN_S", 300.0)
        limits.allow_files()
        store, prefix, _board = joining.meet(connect, rank, world_size, limit_s)
        if world_size > ranks.local_world_size:
            network.lead_to_others(os.environ, environment.meeting_point(os.environ)[0], _board.addresses)
        store.set_timeout(_timeout)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=PrefixStore(prefix, store),
            rank=rank,
            world_size=world_size,
            timeout=_timeout + timedelta(seconds=60) if on_gpu else _timeout,
            device_id=ranks.device if on_gpu else None,
        )
    return ranks


def shutdown() -> None:
    """Leave the process group, if there is one, with all other ranks."""
    _forget()
    if _is_up():
        dist.destroy_process_group()


def abandon(limit_s: float = 10.0) -> bool:
    """Leave the process group alone, after an error; whether that was done in so many seconds.

    What waits on the device for other ranks is given up: kernels of nccl would keep the process from ending, until
    the others have ended too or the collective times out.  The ranks that wait for this one notice once it has ended.
    """
    if not _is_up():
        return True
    _forget()
    abort: Callable[[], None] = getattr(dist.distributed_c10d, "_abort_process_group", dist.destroy_process_group)

    def leave() -> None:
        with suppress(Exception):  # what could not be done in good order is not said: the error itself is
            abort()

    # It may wait for a driver or for threads that hang.
    leaving = threading.Thread(target=leave, daemon=True, name="leaving the other ranks")
    leaving.start()
    leaving.join(limit_s)
    return not leaving.is_alive()


def _forget() -> None:
    """All that was made for the process group."""
    global _board
    _board = None
    _control_group.cache_clear()
    _named.clear()
    _named[""] = None
    _steady.clear()


def host_store() -> TCPStore:
    """The store at which ranks of this machine meet, held by their launcher on a port that the system chooses.

    They find it by MASTER_ADDR=127.0.0.1, MASTER_PORT and TORCHELASTIC_USE_AGENT_STORE=True; it lives as long as the
    object.
    """
    listening = network.listen("127.0.0.1", 0)
    return connect("127.0.0.1", listening.getsockname()[1], listening)


def connect(host: str, port: int, listening: socket.socket | None) -> TCPStore:
    """What asks the store at that address; with a listening socket, which becomes its own, the store itself."""
    fd = listening.detach() if listening else None
    return TCPStore(
        host, port, is_master=fd is not None, timeout=timedelta(seconds=30), wait_for_workers=False, master_listen_fd=fd
    )


_board: joining.Board | None = None


def board() -> joining.Board | None:
    """The board of the ranks that ``init`` joined; None for a single one."""
    return _board


def num_collectives() -> int:
    """Collectives of all ranks that this rank has begun; where all of them wait, it is the same number on all."""
    return vars(dist.ProcessGroup)["_get_sequence_number_for_group"](dist.group.WORLD) if _is_up() else 0


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
    made = dist.new_group(members, _timeout, backend="gloo", use_local_synchronization=members is not None)
    return cast("dist.ProcessGroup", made)


@blocking
def all_gather(x: Tensor, group: Group = None) -> Tensor:
    """(B, ...) on each of W ranks -> (W*B, ...), rank-major, contiguous, the same on all; no gradient."""
    x = x.detach().contiguous()
    if world_size(group) == 1:
        return x
    gathered = x.new_empty((world_size(group) * x.shape[0], *x.shape[1:]))
    _all_gather_single(gathered, x, group=group)
    return gathered


def start_all_gather(x: Tensor, group: Group = None) -> Callable[[], Tensor]:
    """``all_gather`` in the background: call what it returns for the result.  x must stay as it is until then."""
    x = x.detach().contiguous()
    if world_size(group) == 1:
        return lambda: x
    gathered = x.new_empty((world_size(group) * x.shape[0], *x.shape[1:]))
    work = _all_gather_single(gathered, x, group=group, async_op=True)

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
        _reduce_scatter_single(own, summed, group=ctx.group)
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


_steady: dict[tuple[str, str], int] = {}  # the sizes that all ranks have had in this loop, by what and whose they are
_in_loop = False


@contextmanager
def steady_sizes() -> Generator[None]:
    """While it is entered, sizes do not change from step to step, so ``check_same`` asks the other ranks but once."""
    global _in_loop
    _in_loop = True
    try:
        yield
    finally:
        _in_loop = False
        _steady.clear()


def check_same(value: int, what: str, group: Group = None) -> None:
    """Raise DataError on all ranks unless all bring the same value; a round over the hosts, none on the GPUs.

    For sizes that a collective takes on trust: nccl hangs on unequal ones, or mixes up the rows.  In a loop of steps
    (``steady_sizes``) only the first such value of a kind costs a round; a rank whose value then changes raises
    DataError by itself, before it has told the others anything, and they learn nothing without it.
    """
    if world_size(group) == 1:
        return
    key = what, name_of(group)
    before = _steady.get(key, value)
    if before != value:
        raise DataError(
            f"expected the same {what} at every step, got {before} before and now {value} on rank {rank(group)}: "
            "cut the data evenly"
        )
    if key not in _steady:
        _ask_for_same(value, what, group)
        if _in_loop:
            _steady[key] = value


@blocking
def _ask_for_same(value: int, what: str, group: Group) -> None:
    values = torch.empty(world_size(group), dtype=torch.int64)
    _all_gather_single(values, torch.tensor([value]), group=_control_group(group))
    seen: list[int] = values.tolist()
    if len(set(seen)) > 1:
        raise DataError(f"expected the same {what} on every rank, got {seen} by rank: cut the data evenly")


@blocking
def broadcast(x: Tensor, src: int = 0) -> None:
    """Make x rank ``src``'s, in place."""
    if world_size() > 1:
        dist.broadcast(x, src)


@activity.doing(_WAITING)
def broadcast_object(obj: Any, src: int = 0) -> Any:
    """Rank ``src``'s object, on all ranks (pickled)."""
    if world_size() == 1:
        return obj
    objects = [obj]
    dist.broadcast_object_list(objects, src=src, group=_control_group(None))
    return objects[0]


@activity.doing(_WAITING)
def gather_objects(obj: Any) -> list[Any]:
    """Every rank's object in the order of ranks, on all ranks (pickled)."""
    if world_size() == 1:
        return [obj]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, obj, group=_control_group(None))
    return objects


@activity.doing(_WAITING)
def barrier() -> None:
    """Wait until all ranks are here."""
    if world_size() > 1:
        dist.barrier(group=_control_group(None))


@activity.doing(_WAITING)
@blocking
def wait_for_main() -> None:
    """Wait until rank 0 is here too, however long: what it does alone may take longer than a collective waits."""
    if _board is not None:
        _board.wait_for_main()


def start_max(x: Tensor, group: Group = None) -> dist.Work:
    """The elementwise largest of every rank's x, in place, over the hosts and in the background: ``wait()`` for it."""
    work = dist.all_reduce(x, op=dist.ReduceOp.MAX, group=_control_group(group), async_op=True)
    assert work is not None
    return work
