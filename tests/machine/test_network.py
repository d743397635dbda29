"""By which network ranks reach each other: the one that leads to the master, whatever a host takes its own name for."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sslx.machine import network

ROOT = Path(__file__).parents[2]


def test_the_interface_of_an_address_is_that_of_the_system() -> None:
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.interface_of("198.51.100.1") == ""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2 to ask")
    lines = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, check=True).stdout.splitlines()
    known = [re.search(r"^\d+: (\S+) +inet6? ([0-9a-f.:]+)", line) for line in lines]
    assert [network.interface_of(each[2]) for each in known if each] == [each[1] for each in known if each]


def test_the_address_that_packets_leave_with() -> None:
    assert network.source_address("127.0.0.1") == "127.0.0.1"
    assert network.source_address("no.such.host.invalid") == network.source_address("") == ""


def test_what_is_set_stays_and_one_machine_needs_nothing() -> None:
    environ = {"GLOO_SOCKET_IFNAME": "eth7", "TORCH_GLOO_LAZY_INIT": "0"}
    network.choose_interface(environ, "127.0.0.1", list)
    assert environ == {"GLOO_SOCKET_IFNAME": "eth7", "TORCH_GLOO_LAZY_INIT": "0"}
    environ = dict[str, str]()
    network.choose_interface(environ, "127.0.0.1", lambda: ["127.0.0.1", ""])
    assert environ == {"TORCH_GLOO_LAZY_INIT": "1"}


class Machines:
    """Three network namespaces with a router between them, each with a host name that it takes for 127.0.1.1.

    The first network of each leads nowhere, the second to the others, as a cluster's nodes have it.
    """

    def __init__(self) -> None:
        tag = f"sx{uuid.uuid4().hex[:6]}"
        self.router, self.names = f"{tag}r", [f"{tag}n{i}" for i in range(3)]

    def up(self) -> None:
        self.ip("netns", "add", self.router)
        self.ip("netns", "exec", self.router, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
        for i, name in enumerate(self.names):
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")
            for device, address in (("eth0", f"192.0.2.{i + 1}/24"), ("fast0", f"10.213.{i}.2/24")):
                self.ip("-n", name, "link", "add", device, "type", "veth", "peer", f"{device}{i}", "netns", self.router)
                self.ip("-n", name, "addr", "add", address, "dev", device)
                self.ip("-n", name, "link", "set", device, "up")
                self.ip("-n", self.router, "link", "set", f"{device}{i}", "up")
            self.ip("-n", self.router, "addr", "add", f"10.213.{i}.1/24", "dev", f"fast0{i}")
            self.ip("-n", name, "route", "add", "10.213.0.0/16", "via", f"10.213.{i}.1")
            hosts = ["127.0.0.1 localhost", f"127.0.1.1 {name}"]
            hosts += [f"127.0.0.1 {self.names[0]}", f"10.213.0.2 {self.names[0]}"]  # the master's, one of them old
            hosts += [f"10.213.{j}.2 {other}" for j, other in enumerate(self.names) if j != i]
            (folder := Path("/etc/netns") / name).mkdir(parents=True)
            (folder / "hosts").write_text("\n".join(hosts) + "\n")  # `ip netns exec` mounts it over /etc/hosts

    def down(self) -> None:
        for name in (self.router, *self.names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def ip(self, *args: str) -> None:
        subprocess.run(["ip", *args], capture_output=True, text=True, check=True)

    def start(self, i: int, argv: list[str], environ: dict[str, str]) -> "subprocess.Popen[str]":
        """A process on machine i, under its own host name."""
        inside = ["unshare", "--uts", "sh", "-c", f'hostname {self.names[i]} && exec "$@"', "sh", *argv]
        command = ["ip", "netns", "exec", self.names[i], *inside]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environ, start_new_session=True, **options)


@pytest.fixture
def machines() -> Iterator[Machines]:
    found = Machines()
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        pytest.skip("needs root, iproute2 and unshare, for network namespaces")
    try:
        found.up()
    except (subprocess.CalledProcessError, OSError) as error:
        found.down()
        said = getattr(error, "stderr", "") or str(error)
        pytest.skip(f"this machine allows no network namespaces: {said.strip()}")
    yield found
    found.down()


SCRIPT = """
import os, torch
import torch.distributed as dist
from sslx import distributed
from sslx.machine import network
if "LEFT_OUT" in os.environ:
    network.choose_interface = lambda *_: None
ranks = distributed.init("cpu", timeout_s=float(os.environ.get("TIMEOUT_S", "20")), join_s=60)
total = distributed.sum_over_ranks(torch.tensor(float(2**ranks.rank)))
hosts = distributed.gather_objects(os.uname().nodename)
distributed.barrier()
said = [os.environ.get(f"{name}_SOCKET_IFNAME") for name in ("GLOO", "NCCL")]
print("SAYS", int(total), *said, *hosts, flush=True)
distributed.shutdown()
"""


def outputs(machines: Machines, launcher: str, folder: Path, more: dict[str, str]) -> list[tuple[int, str]]:
    """(exit code, output) of a script on each machine, started as ``launcher`` starts it."""
    (script := folder / "script.py").write_text(SCRIPT)
    environ = {name: v for name, v in os.environ.items() if not name.startswith(("SLURM_", "GLOO_", "NCCL_"))}
    environ |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", **more}
    started: list[subprocess.Popen[str]] = []
    master, port = machines.names[0], "29417"
    for i in range(3):
        own = dict(environ)
        if launcher == "srun":
            own |= {"SLURM_PROCID": str(i), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "0"}
            own |= {"SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_STEP_NODELIST": ",".join(machines.names)}
            argv = [sys.executable, str(script)]
        else:
            argv = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "3", "--nproc-per-node", "1"]
            argv += ["--node-rank", str(i), "--master-addr", master, "--master-port", port, str(script)]
        started.append(machines.start(i, argv, own))
    deadline = time.monotonic() + 200
    try:
        found = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, found, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_ranks_of_three_machines_find_the_network_that_leads_to_the_others(
    machines: Machines, tmp_path: Path, launcher: str
) -> None:
    """Where gloo would take 127.0.1.1, the address of each host's own name."""
    for code, text in outputs(machines, launcher, tmp_path, {}):
        assert code == 0, text
        assert f"SAYS 7 fast0 =fast0 {' '.join(machines.names)}" in text


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["LEFT_OUT", "GLOO_SOCKET_IFNAME"])
def test_by_their_own_names_or_over_another_network_they_would_not_meet(
    machines: Machines, tmp_path: Path, fault: str
) -> None:
    """The test above can fail."""
    results = outputs(machines, "torchrun", tmp_path, {fault: "eth0", "TIMEOUT_S": "4"})
    assert all(code for code, _ in results), results


def test_a_host_name_that_is_loopback_here_is_led_to_by_what_others_come_from() -> None:
    """The master's own hosts file has its name as 127.0.1.1."""
    away = network.source_address("198.51.100.1")
    if not away or network.interface_of(away) == "lo":
        pytest.skip("this machine has no network but its own")
    environ = dict[str, str]()
    network.choose_interface(environ, "127.0.1.1", lambda: ["127.0.0.1", away])
    assert environ["GLOO_SOCKET_IFNAME"] in {name for _, name in socket.if_nameindex()} - {"lo"}
