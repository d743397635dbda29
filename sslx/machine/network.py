"""The network between ranks: resolve an address, bind or reach a port, and choose the interface to other machines.

Each wait has a limit, and torch's warnings are avoided.
"""

import ctypes
import errno
import ipaddress
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress

from sslx.errors import ConfigError, RanksError

RESOLVE_S, BIND_S = 5.0, 5.0
"""Time for a slow name server to answer, and for the port of a step that has just ended to become free."""


def resolve(host: str) -> None:
    """Raise ConfigError unless the host name can be resolved within RESOLVE_S."""
    deadline = time.monotonic() + RESOLVE_S
    problem = f"no answer from the name server in {RESOLVE_S:g} s"
    while (left_s := deadline - time.monotonic()) > 0:
        results: list[str] = []
        thread = threading.Thread(target=_look_up, args=(host, results), daemon=True)  # getaddrinfo has no timeout
        thread.start()
        thread.join(left_s)
        if results == [""]:
            return
        problem = results[0] if results else problem
        if problem.startswith("invalid name: "):
            break
        time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))
    raise ConfigError(
        f"expected MASTER_ADDR to be the address of rank 0's machine, but {host!r:.120} cannot be resolved ({problem})"
        ": correct it, or use torchrun"
    )


def _look_up(host: str, results: list[str]) -> None:
    """Append "" to results if the host can be resolved, else the problem."""
    try:
        socket.getaddrinfo(host, None)
        results.append("")
    except UnicodeError:
        results.append("invalid name: a part of it is empty, too long or not ASCII")
    except OSError as error:
        results.append(error.strerror or str(error))


def bind(port: int) -> socket.socket:
    """Return a socket that listens on this port at all addresses of the machine.

    Raise RanksError if the port remains in use for BIND_S.
    """
    deadline = time.monotonic() + BIND_S
    while True:
        try:
            return listen("", port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                reason = (
                    "is in use by another program" if error.errno == errno.EADDRINUSE else f"fails: {error.strerror}"
                )
                raise RanksError(
                    f"expected port {port} (MASTER_PORT) of this machine to be free for rank 0, but it {reason}: "
                    "set MASTER_PORT to a free port"
                ) from error
            time.sleep(0.5)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket.  Host "" means all addresses, IPv6 included.  Raise OSError if that fails."""
    if not host and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=4_096, dualstack_ipv6=True)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    return socket.create_server((host, port), backlog=4_096)


def is_listening(host: str, port: int, timeout_s: float = 2.0) -> bool:
    """Return whether a process listens at an address."""
    try:
        with socket.create_connection((host, port), timeout_s):
            return True
    except OSError:
        return False


def choose_interface(
    environ: MutableMapping[str, str], master: str, other_addresses: Callable[[], Sequence[str]]
) -> None:
    """Make gloo and NCCL use the network that reaches the other machines, unless their variables are set.

    By default, gloo uses the address of the host's own name, which is 127.0.1.1 on Debian and only one of many with
    several networks.  master: MASTER_ADDR.  other_addresses: returns the addresses from which other ranks reach this
    machine; called if MASTER_ADDR is on it.

    gloo is also set to connect two ranks when they first communicate.  Otherwise each rank would hold a socket for
    every other one.
    """
    environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if "GLOO_SOCKET_IFNAME" in environ:
        return
    own = source_address(master)
    if _is_loopback(own):  # MASTER_ADDR is this machine, whose hosts file may map its name to a loopback address
        addresses = (address for address in other_addresses() if address and not _is_loopback(address))
        own = source_address(next(addresses, ""))
    if own and not _is_loopback(own) and (name := interface_of(own)):
        environ["GLOO_SOCKET_IFNAME"] = name
        environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=" excludes other names with this prefix (eth1, eth10)


def source_address(host: str) -> str:
    """Return the address from which packets leave this machine for a host, or "" if it is unknown.

    If the host name has several addresses, the first that does not lead to this machine's loopback counts: a hosts
    file may have an old line for the name beside the right one, and connecting tries all addresses.
    """
    sources: list[str] = []
    with suppress(OSError, UnicodeError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM) if host else ():
            with suppress(OSError), socket.socket(family, kind, protocol) as udp:
                udp.connect(address)  # sends nothing
                sources.append(udp.getsockname()[0])
    return next((address for address in sources if not _is_loopback(address)), sources[0] if sources else "")


def _is_loopback(address: str) -> bool:
    return bool(address) and ipaddress.ip_address(address.partition("%")[0]).is_loopback


class _Interface(ctypes.Structure):
    """The fields of Linux's ``struct ifaddrs`` up to the address."""


_Interface._fields_ = [
    ("next", ctypes.POINTER(_Interface)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]
_ADDRESS_AT: dict[int, tuple[int, int]] = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}
"""(offset, length) of the address in a socket address."""


def interface_of(address: str) -> str:
    """Return this machine's network interface that has the address, or ""."""
    if sys.platform != "linux":
        return ""
    target = ipaddress.ip_address(address.partition("%")[0]).packed
    libc, first = ctypes.CDLL(None), ctypes.POINTER(_Interface)()
    if libc.getifaddrs(ctypes.byref(first)):
        return ""
    try:
        entry = first
        while entry:
            fields = entry.contents
            family = ctypes.c_ushort.from_address(fields.address).value if fields.address else socket.AF_UNSPEC
            start, length = _ADDRESS_AT.get(family, (0, 0))
            if length and ctypes.string_at(fields.address + start, length) == target:
                return os.fsdecode(fields.name)
            entry = fields.next
        return ""
    finally:
        libc.freeifaddrs(first)
