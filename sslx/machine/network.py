"""Where ranks meet: an address resolved and a port bound or reached, within a limit and without torch's warnings.

And by which of this machine's networks they then reach each other.
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
"""A name server may be slow, and the port of a step that has just ended may be free in a moment."""


def resolve(host: str) -> None:
    """Raise ConfigError unless the host's name can be resolved within RESOLVE_S."""
    deadline = time.monotonic() + RESOLVE_S
    words = f"no answer from the name server in {RESOLVE_S:g} s"
    while (left := deadline - time.monotonic()) > 0:
        results: list[str] = []
        asking = threading.Thread(target=_ask, args=(host, results), daemon=True)  # the call knows no limit
        asking.start()
        asking.join(left)
        if results == [""]:
            return
        words = results[0] if results else words
        if words.startswith("no name: "):
            break
        time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))
    raise ConfigError(
        f"expected MASTER_ADDR to be the address of rank 0's machine, {host!r:.120} cannot be resolved ({words}): "
        "correct it, or use torchrun"
    )


def _ask(host: str, results: list[str]) -> None:
    try:
        socket.getaddrinfo(host, None)
        results.append("")
    except UnicodeError:
        results.append("no name: a part of it is empty, too long or not ASCII")
    except OSError as error:
        results.append(error.strerror or str(error))


def bind(port: int) -> socket.socket:
    """A socket that listens on this port of all of the machine's addresses.

    RanksError where the port stays in use for BIND_S.
    """
    deadline = time.monotonic() + BIND_S
    while True:
        try:
            return listen("", port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                why = "is in use by another program" if error.errno == errno.EADDRINUSE else f"fails: {error.strerror}"
                raise RanksError(
                    f"expected port {port} (MASTER_PORT) of this machine to be free for rank 0, it {why}: "
                    "set MASTER_PORT to a free port"
                ) from error
            time.sleep(0.5)


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; host "": all addresses, of IPv6 too where there is one.  OSError where it cannot."""
    if not host and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=4_096, dualstack_ipv6=True)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    return socket.create_server((host, port), backlog=4_096)


def answers(host: str, port: int, timeout_s: float = 2.0) -> bool:
    """Whether something listens there."""
    try:
        with socket.create_connection((host, port), timeout_s):
            return True
    except OSError:
        return False


def lead_to_others(environ: MutableMapping[str, str], master: str, others: Callable[[], Sequence[str]]) -> None:
    """Have gloo and nccl connect over the network that leads to the other machines, unless the variables are set.

    gloo takes the address of the host's own name: 127.0.1.1 on Debian, and one of many where there are many networks.
    master: MASTER_ADDR.  others: asked for the addresses that other ranks reach it from where it is on this machine.
    And gloo connects each pair of ranks when they first talk: a rank would else hold a socket for every other one.
    """
    environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if "GLOO_SOCKET_IFNAME" in environ:
        return
    own = source_address(master)
    if _is_loopback(own):  # its name is this machine's, which its own hosts file may know by such an address
        own = source_address(next((address for address in others() if address and not _is_loopback(address)), ""))
    if own and not _is_loopback(own) and (name := interface_of(own)):
        environ["GLOO_SOCKET_IFNAME"] = name
        environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": not a prefix, as eth1 is one of eth10


def source_address(host: str) -> str:
    """The address that packets from here to this host leave with; "" where it cannot be found out.

    Of a host that has several addresses the first that is not this machine's loopback counts: a hosts file may hold
    an old line for a name beside the right one, and what connects tries them all.
    """
    found: list[str] = []
    with suppress(OSError, UnicodeError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM) if host else ():
            with suppress(OSError), socket.socket(family, kind, protocol) as udp:
                udp.connect(address)  # sends nothing
                found.append(udp.getsockname()[0])
    return next((address for address in found if not _is_loopback(address)), found[0] if found else "")


def _is_loopback(address: str) -> bool:
    return bool(address) and ipaddress.ip_address(address.partition("%")[0]).is_loopback


class _Interface(ctypes.Structure):
    """struct ifaddrs of Linux, up to the address."""


_Interface._fields_ = [
    ("next", ctypes.POINTER(_Interface)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]
_ADDRESS_AT: dict[int, tuple[int, int]] = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}
"""(offset, length) of the address in a socket address."""


def interface_of(address: str) -> str:
    """The network interface of this machine that has the address; "" where there is none."""
    if sys.platform != "linux":
        return ""
    wanted = ipaddress.ip_address(address.partition("%")[0]).packed
    libc, first = ctypes.CDLL(None), ctypes.POINTER(_Interface)()
    if libc.getifaddrs(ctypes.byref(first)):
        return ""
    try:
        entry = first
        while entry:
            one = entry.contents
            family = ctypes.c_ushort.from_address(one.address).value if one.address else socket.AF_UNSPEC
            start, length = _ADDRESS_AT.get(family, (0, 0))
            if length and ctypes.string_at(one.address + start, length) == wanted:
                return os.fsdecode(one.name)
            entry = one.next
        return ""
    finally:
        libc.freeifaddrs(first)
