"""Hosts for the workers of `cluster.py`: network namespaces on links of limited rate.

Every host is a network namespace with one interface, `eth0`. Its other end is a port of
a bridge, which has a namespace of its own, so that nothing shows up among the machine's
own interfaces. `tc` limits the rate at both ends: what a host sends and what it is
sent. Namespaces own the interfaces in them, and take them along when they go.
"""

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

RATES = {"100mbit": 100e6, "1gbit": 1e9, "10gbit": 10e9}  # name for tc -> bit/s
QUEUE = 2**24  # bytes that wait at most: more than TCP sends at once, so none is lost
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
HOSTS_FILES = Path("/etc/netns")  # where `ip netns exec` looks for them
NAMESPACES = Path("/run/netns")
PORT = 47000
# Whether all that a worker imports may be read, and its folders reached.
LOOK = """
import importlib.util, os, sys
for name in "cluster_task", "efopt", "flax", "jax", "jaxlib", "optax", "sklearn":
    open(importlib.util.find_spec(name).origin).close()
assert os.access(sys.argv[1], os.X_OK)
"""
PREFIX = "efopt-"  # of all names; behind it stands the process


class ClusterError(Exception):
    """A cluster that cannot be, or that failed. The message is for the user."""


class Host(NamedTuple):
    """Where a worker runs: what stands before its command, and its interface."""

    command: tuple[str, ...]
    interface: str


class Network(NamedTuple):
    """Hosts, the first of which is reached by the others at `address`."""

    hosts: list[Host]
    address: str
    owner: tuple[int, int] | None = None  # user and group of the workers, if not ours


def obstacle():
    """Why links cannot be limited here, or `None`."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found (Debian and Ubuntu: iproute2)"
    try:
        with limited(next(iter(RATES)), 1):
            return None
    except ClusterError as error:
        return str(error)


def localhost(workers, port=0):
    """Hosts that are all this machine itself, on links as fast as its memory."""
    name = socket.gethostname()
    try:
        socket.gethostbyname(name)
    except OSError as error:
        raise ClusterError(
            f"gloo looks up this machine's own name, {name}, and it has no address: "
            f"add it to /etc/hosts ({error})"
        ) from error
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ClusterError(
                f"port {port} is in use or not allowed, choose another --port ({error})"
            ) from error
        port = probe.getsockname()[1]
    return Network(workers * [Host((), "lo")], f"127.0.0.1:{port}")


@contextlib.contextmanager
def limited(rate, workers):
    """A network of hosts that send and receive at `rate`, gone when it is left."""
    sweep()
    prefix = f"{PREFIX}{os.getpid()}-"
    with cleaning_up() as cleanup:
        hub = _namespace(prefix + "hub", cleanup)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        names = [_namespace(f"{prefix}{i}", cleanup) for i in range(workers)]
        for i, name in enumerate(names):
            port, address = f"port{i}", _address(i)
            pair = "type", "veth", "peer", "name", "eth0", "netns", name
            _ip("-n", hub, "link", "add", port, *pair)
            _ip("-n", hub, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            _limit(hub, port, rate)
            _limit(name, "eth0", rate)
            _name_host(name, address, cleanup)
        drop, owner = unprivileged()
        hosts = [Host(("ip", "netns", "exec", name, *drop), "eth0") for name in names]
        yield Network(hosts, f"{_address(0)}:{PORT}", owner)


@contextlib.contextmanager
def cleaning_up():
    """An exit stack whose callbacks are not interrupted by a signal."""
    with contextlib.ExitStack() as stack:
        try:
            yield stack
        finally:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            try:
                stack.close()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)


def folder_of_its_own():
    """A temporary folder, gone when it is left, or swept up later."""
    return tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-")


def sweep():
    """Removes what benchmarks left behind that were killed: names of dead processes."""
    namespaces = [*NAMESPACES.glob(f"{PREFIX}*")] if NAMESPACES.is_dir() else []
    folders = [*HOSTS_FILES.glob(f"{PREFIX}*")] if HOSTS_FILES.is_dir() else []
    folders += Path(tempfile.gettempdir()).glob(f"{PREFIX}*")
    for path in (*namespaces, *folders):
        pid = path.name.removeprefix(PREFIX).partition("-")[0]
        if not pid.isdigit() or Path("/proc", pid).exists():
            continue
        if path in namespaces:
            subprocess.run(["ip", "netns", "del", path.name], capture_output=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


@functools.cache
def unprivileged():
    """What makes a worker somebody who is not root, which it need not be, and whom.

    Whoever called `sudo`, else nobody: if they may read this Python and these files.
    """
    if shutil.which("setpriv") is None:
        return (), None
    user, group = (os.environ.get(name, "65534") for name in ("SUDO_UID", "SUDO_GID"))
    drop = "setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"
    look = [sys.executable, "-c", LOOK, tempfile.gettempdir()]
    here = Path(__file__).parent
    tried = subprocess.run([*drop, *look], cwd=here, capture_output=True)
    return (drop, (int(user), int(group))) if tried.returncode == 0 else ((), None)


def _address(i):
    return f"10.77.0.{i + 1}"


def _namespace(name, cleanup):
    cleanup.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
    _ip("netns", "add", name)
    return name


def _limit(namespace, interface, rate):
    # What may pass at once: 100 us of the link, and at least a few packets.
    burst = str(max(16_000, int(RATES[rate] / 8 * 100e-6)))
    bucket = "tbf", "rate", rate, "burst", burst, "limit", str(QUEUE)
    _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", *bucket)


def _name_host(namespace, address, cleanup):
    """Gives a namespace a hosts file: gloo resolves the name that all of them share."""
    if not HOSTS_FILES.exists():
        cleanup.callback(HOSTS_FILES.rmdir)
        HOSTS_FILES.mkdir()
    folder = HOSTS_FILES / namespace
    cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
    folder.mkdir()
    entries = f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n"
    (folder / "hosts").write_text(entries)


def _ip(*arguments):
    _run("ip", *arguments)


def _run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ClusterError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
