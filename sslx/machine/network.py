"""Where ranks meet: an address resolved and a port bound or reached, within a limit and without torch's warnings."""

import errno
import socket
import threading
import time

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
