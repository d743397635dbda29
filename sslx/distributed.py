"""Ranks and the communication between them: start-up, gathers, sums, and checks that all ranks agree.

Only this module (and ``parallel``) imports ``torch.distributed``.  Every function also works on one rank without a
process group, so that no caller asks how many ranks there are.
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
from sslx.machine import devices, environment, limits, network, rendezvous
from sslx.machine.environment import launched_rank as launched_rank
from sslx.machine.environment import local_world_size as local_world_size
from sslx.machine.stopwatch import blocking

Group: TypeAlias = "dist.ProcessGroup | None"
# torch 2.14 renamed both functions and warns about the old names, which are the only ones in torch 2.11 to 2.13.
_NAMES = ("all_gather_single", "all_gather_into_tensor"), ("reduce_scatter_single", "reduce_scatter_tensor")
_all_gather_single, _reduce_scatter_single = (getattr(dist, new if hasattr(dist, new) else old) for new, old in _NAMES)
_WAITING = "waiting for the other ranks"
_timeout: timedelta | None = None  # from init, for later groups: new_group's default is 30 minutes


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The place of this process among all ranks and those of its machine, and its device.

    Example: ``Ranks(device=torch.device("cpu"))`` is a single process.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0


def init(device: devices.Device = "auto", timeout_s: float | None = None, join_s: float | None = None) -> Ranks:
    """Join the ranks that torchrun or Slurm started.  Without either, this process is the only rank.

    device: "auto" uses this rank's GPU if there is one.  NCCL connects GPUs, gloo CPUs.
    timeout_s: seconds that a collective waits for the slowest rank before the job ends with an error; the default is
      SSLX_STALL_S, or 600.  NCCL waits a minute longer, because it ends the process without a message.
    join_s: seconds to wait for the other ranks to come; the default is SSLX_JOIN_S, or 300.
    Raise ConfigError for a missing GPU or an incomplete or invalid environment, and RanksError if ranks do not come or
    the port is taken.
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
        limits.raise_file_limit()
        store, prefix, _board = rendezvous.meet(connect, rank, world_size, limit_s)
        if world_size > ranks.local_world_size:
            network.choose_interface(os.environ, environment.meeting_point(os.environ)[0], _board.addresses)
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
    """Leave the process group, if there is one, together with all other ranks."""
    _clear_state()
    if _is_up():
        dist.destroy_process_group()


def abandon(limit_s: float = 10.0) -> bool:
    """Leave the process group without the other ranks, after an error.  Return whether it took at most limit_s seconds.

    Operations on the device that wait for other ranks are aborted: NCCL's kernels would otherwise keep the process
    alive until the others have ended or the collective times out.  Ranks that wait for this one notice its end.
    """
    if not _is_up():
        return True
    _clear_state()
    abort: Callable[[], None] = getattr(dist.distributed_c10d, "_abort_process_group", dist.destroy_process_group)

    def leave() -> None:
        with suppress(Exception):  # only the error that led here is reported
            abort()

    # In a thread, because it may wait for a hanging driver or other threads.
    thread = threading.Thread(target=leave, daemon=True, name="leaving the other ranks")
    thread.start()
    thread.join(limit_s)
    return not thread.is_alive()


def _clear_state() -> None:
    """Drop everything that belongs to the process group."""
    global _board
    _board = None
    _control_group.cache_clear()
    _groups.clear()
    _groups[""] = None
    _agreed_sizes.clear()


def host_store() -> TCPStore:
    """Create the store at which ranks of this machine meet, for their launcher, on a free port.

    The ranks find it by MASTER_ADDR=127.0.0.1, MASTER_PORT and TORCHELASTIC_USE_AGENT_STORE=True.  It lives as long as
    the returned object.
    """
    listening = network.listen("127.0.0.1", 0)
    return connect("127.0.0.1", listening.getsockname()[1], listening)


def connect(host: str, port: int, listening: socket.socket | None) -> TCPStore:
    """Connect to the store at an address or, with a listening socket, which is taken over, create the store."""
    fd = listening.detach() if listening else None
    return TCPStore(
        host, port, is_master=fd is not None, timeout=timedelta(seconds=30), wait_for_workers=False, master_listen_fd=fd
    )


_board: rendezvous.Board | None = None


def board() -> rendezvous.Board | None:
    """Return the board of the ranks that ``init`` joined, or None for a single rank."""
    return _board


def num_collectives() -> int:
    """Return how many collectives of all ranks this rank has begun; ranks waiting in the same one return the same."""
    return vars(dist.ProcessGroup)["_get_sequence_number_for_group"](dist.group.WORLD) if _is_up() else 0


def _is_up() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size(group: Group = None) -> int:
    """Return the number of ranks in the group, or 1 without a process group."""
    return dist.get_world_size(group) if _is_up() else 1


def rank(group: Group = None) -> int:
    """Return this process's rank in the group, or 0 without a process group."""
    return dist.get_rank(group) if _is_up() else 0


_groups: dict[str, Group] = {"": None}


def name_of(group: Group) -> str:
    """Return a string that ``group_named`` turns back into the group, for custom operators, which take no objects."""
    if group is None:
        return ""
    _groups[group.group_name] = group
    return group.group_name


def group_named(name: str) -> Group:
    """Return the group that ``name_of`` named."""
    return _groups[name]


@functools.cache
def _control_group(group: Group) -> Group:
    """Return a gloo group of the same ranks for data on the host, so that it neither waits for a GPU nor mixes with
    the gradients.  It is created at the first use, which every rank reaches."""
    members = None if group is None else dist.get_process_group_ranks(group)
    control = dist.new_group(members, _timeout, backend="gloo", use_local_synchronization=members is not None)
    return cast("dist.ProcessGroup", control)


@blocking
def all_gather(x: Tensor, group: Group = None) -> Tensor:
    """Gather (B, ...) from W ranks into (W*B, ...), rank-major, contiguous and equal on all ranks; no gradient."""
    x = x.detach().contiguous()
    if world_size(group) == 1:
        return x
    gathered = x.new_empty((world_size(group) * x.shape[0], *x.shape[1:]))
    _all_gather_single(gathered, x, group=group)
    return gathered


def start_all_gather(x: Tensor, group: Group = None) -> Callable[[], Tensor]:
    """Start ``all_gather`` in the background.  Call the result to wait for it; x must not change until then."""
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
        # pytorch#120386: a collective loses values of a gradient that is not contiguous.
        summed = grads[0].contiguous()
        own = summed.new_empty((summed.shape[0] // world_size(ctx.group), *summed.shape[1:]))
        _reduce_scatter_single(own, summed, group=ctx.group)
        return own, None


def all_gather_grad(x: Tensor, group: Group = None) -> Tensor:
    """Run ``all_gather`` with a gradient: the sum over ranks of the gradients of this rank's slice.

    If each rank's loss is its share of a mean, DDP's mean over ranks is then the full-batch gradient.
    """
    if world_size(group) == 1:
        return x.contiguous()
    return cast(Tensor, _AllGather.apply(x, group))


@blocking
def sum_over_ranks(x: Tensor, group: Group = None) -> Tensor:
    """Return the elementwise sum of x over ranks, on all ranks, without a gradient.  x is not modified."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, equal_grads: bool, group: Group) -> Tensor:
        ctx.group, ctx.equal_grads = group, equal_grads
        return sum_over_ranks(x, group)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        if ctx.equal_grads:
            return grads[0] * world_size(ctx.group), None, None
        return sum_over_ranks(grads[0], ctx.group), None, None


def sum_over_ranks_grad(x: Tensor, group: Group = None, *, equal_grads: bool = False) -> Tensor:
    """Run ``sum_over_ranks`` with a gradient: each rank's x gets the sum over ranks of the gradients of their sums.

    If every rank computes the full-batch loss from such sums, DDP's mean over ranks is then the full-batch gradient.
    equal_grads: every rank computes the same from the sum and from nothing else, so that the gradients are equal and
    the backward needs no communication.
    """
    if world_size(group) == 1:
        return x
    return cast(Tensor, _Sum.apply(x, equal_grads, group))


def mean_over_ranks(x: Tensor, group: Group = None) -> Tensor:
    """Return the elementwise mean of x over ranks, on all ranks, without a gradient."""
    return sum_over_ranks(x, group) / world_size(group)


_agreed_sizes: dict[tuple[str, str], int] = {}  # sizes that all ranks have agreed on in this loop, by (what, group)
_in_loop = False


@contextmanager
def steady_sizes() -> Generator[None]:
    """Promise that sizes are equal in all steps of this block, so that ``check_same`` asks other ranks only once."""
    global _in_loop
    _in_loop = True
    try:
        yield
    finally:
        _in_loop = False
        _agreed_sizes.clear()


def check_same(value: int, what: str, group: Group = None) -> None:
    """Raise DataError on all ranks unless all have the same value.  The check uses the hosts, not the GPUs.

    It is for sizes that a collective does not check: with unequal ones, NCCL hangs or mixes up rows.  Inside
    ``steady_sizes``, only the first check of a kind communicates.  A rank whose value changes later raises DataError
    alone, and the others do not learn of it.
    """
    if world_size(group) == 1:
        return
    key = what, name_of(group)
    before = _agreed_sizes.get(key, value)
    if before != value:
        raise DataError(
            f"expected the same {what} at every step, got {before} before and now {value} on rank {rank(group)}: "
            "cut the data evenly"
        )
    if key not in _agreed_sizes:
        _check_same_on_all(value, what, group)
        if _in_loop:
            _agreed_sizes[key] = value


@blocking
def _check_same_on_all(value: int, what: str, group: Group) -> None:
    values = torch.empty(world_size(group), dtype=torch.int64)
    _all_gather_single(values, torch.tensor([value]), group=_control_group(group))
    by_rank: list[int] = values.tolist()
    if len(set(by_rank)) > 1:
        raise DataError(f"expected the same {what} on every rank, got {by_rank} by rank: cut the data evenly")


@blocking
def broadcast(x: Tensor, src: int = 0) -> None:
    """Copy rank ``src``'s x into x on all ranks, in place."""
    if world_size() > 1:
        dist.broadcast(x, src)


@activity.doing(_WAITING)
def broadcast_object(obj: Any, src: int = 0) -> Any:
    """Return rank ``src``'s object on all ranks (pickled)."""
    if world_size() == 1:
        return obj
    objects = [obj]
    dist.broadcast_object_list(objects, src=src, group=_control_group(None))
    return objects[0]


@activity.doing(_WAITING)
def gather_objects(obj: Any) -> list[Any]:
    """Return every rank's object, in the order of ranks, on all ranks (pickled)."""
    if world_size() == 1:
        return [obj]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, obj, group=_control_group(None))
    return objects


@activity.doing(_WAITING)
def barrier() -> None:
    """Wait until all ranks have called this."""
    if world_size() > 1:
        dist.barrier(group=_control_group(None))


@activity.doing(_WAITING)
@blocking
def wait_for_main() -> None:
    """Wait for rank 0 without a limit, because what it does alone may take longer than a collective may wait."""
    if _board is not None:
        _board.wait_for_main()


def start_max(x: Tensor, group: Group = None) -> dist.Work:
    """Start the elementwise maximum of x over ranks, in place, over the hosts.  Call ``wait()`` on the result."""
    work = dist.all_reduce(x, op=dist.ReduceOp.MAX, group=_control_group(group), async_op=True)
    assert work is not None
    return work
