"""The cluster benchmark: what it computes, what it refuses, what it leaves behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
# A network in a box takes its time: `pytest -m slow`.
pytestmark = pytest.mark.slow
PARAMETERS = 64 * 1408 + 1408 + 2 * (1408 * 1408 + 1408) + 1408 * 10 + 10


@pytest.fixture
def cluster(monkeypatch):
    """The module, without running it."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import cluster

    return cluster


@pytest.fixture
def network(cluster):
    return cluster.cluster_network


@pytest.fixture
def limited(network):
    if reason := network.obstacle():
        pytest.skip(f"links cannot be limited here: {reason}")
    return network.limited


def start(folder, *options):
    """The benchmark as a process of its own, with all its files in `folder`."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": str(folder)}
    environment.pop("XLA_FLAGS", None)
    return subprocess.Popen(
        [sys.executable, BENCHMARKS / "cluster.py", "--output", folder, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def namespaces(pid):
    """What a benchmark's process has made of names for `ip netns`."""
    folders = Path("/run/netns"), Path("/etc/netns")
    return [path for f in folders if f.is_dir() for path in f.glob(f"efopt-{pid}-*")]


def workers(folder):
    """Command lines of worker processes that report to `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if "cluster_jax.py" in command and str(folder) in command:
            found.append(command)
    return found


def test_prediction(cluster):
    rows = {"sign": {"latency": 0.002}, "torch dense": {}}
    alone = {"sign": {"step_seconds": 0.03}}
    cluster.add_predictions("100mbit", rows, alone, workers=2)
    # 4 M signs and a scale for each 1024, in one message, at 100 Mbit/s.
    wire = 8 * (4_073_354 / 8 + 4_073_354 / 1024 * 4) / 100e6
    assert rows["sign"]["predicted_seconds"] == pytest.approx(0.032 + wire, rel=0.01)
    assert rows["torch dense"] == {}


def test_rounds_are_held_against_steps_alone(cluster):
    """A step alone, what compressing adds, and a thirtieth of the link's time."""
    rows = {
        "alone": {"latency": 0.0, "step_seconds": 0.02},
        "sign, 30": {"latency": 0.0, "step_seconds": 0.025},
    }
    unlimited = {"alone": {"step_seconds": 0.03}, "sign, 30": {"step_seconds": 0.031}}
    cluster.cluster_outer.add_plans(100e6, rows, unlimited, workers=2)
    wire = 8 * (4_073_354 / 8 + 4_073_354 / 1024 * 4) / 100e6
    predicted = [row["predicted_seconds"] for row in rows.values()]
    assert predicted == pytest.approx([0.02, 0.021 + wire / 30], rel=0.001)
    within = (30 * 0.001 + wire) / (0.1 * 0.02)
    assert 0 <= rows["sign, 30"]["every_within_a_tenth"] - within < 1.2
    for row in rows.values():
        row |= {"processor_seconds": 0.02, "loss": 1.0}
    head, *lines = cluster.cluster_outer.table(rows).splitlines()
    assert [len(line) for line in lines] == 2 * [len(head)]
    figures = "sign, 30 25.0 ms 1.25x 20.0 ms 22.4 ms -10% 37 1.000 -"
    assert lines[1].split() == figures.split()


def test_workers_are_averaged(cluster):
    one = {"step_seconds": 1.0, "interface_bytes": None, "losses": [9.0, *5 * [1.0]]}
    two = {"step_seconds": 2.0, "interface_bytes": None, "losses": [9.0, *5 * [3.0]]}
    assert cluster.merge([one, two]) == {"step_seconds": 1.5, "loss": 2.0}


def test_table(cluster):
    rows = {
        "dense": {"step_seconds": 1.5, "loss": 0.5, "hlo_bytes": 4000},
        "sign": {
            "step_seconds": 0.1,
            "loss": 0.6,
            "hlo_bytes": 100_000,
            "interface_bytes": 105_000.0,
            "predicted_seconds": 0.09,
        },
    }
    head, dense, sign = cluster.table(rows).splitlines()
    assert len(head) == len(dense) == len(sign)
    assert dense.split() == "dense 1,500 ms 1.0x - 0.500 4 kB - -".split()
    figures = "sign 100 ms 15.0x 90 ms -10% 0.600 100 kB 105 kB 1.05"
    assert sign.split() == figures.split()


def test_machine_is_named_by_what_matters(cluster):
    title = cluster.machine(2)
    assert title.startswith(f"2 workers on {os.cpu_count()} cores (")
    assert socket.gethostname() not in title


@pytest.mark.parametrize(
    "options, reason",
    [
        ("--rates 56k", "no '56k', choose from 100mbit, 1gbit, 10gbit"),
        ("--workers 1", "must be 2 to 4, got 1"),
        ("--workers 5", "must be 2 to 4, got 5"),
        ("--workers two", "invalid int value: 'two'"),
        ("--methods adam", "no 'adam', choose from dense, sign"),
        ("--steps 3", "must be at least 4, got 3"),
        ("--rounds 0", "must be at least 1, got 0"),
        ("--batch 0", "must be at least 1, got 0"),
        ("--batch 8 64", "several go with --outer alone"),
        ("--port -1", "must be 0 to 65535, got -1"),
        ("--port 65536", "must be 0 to 65535, got 65536"),
        ("--output no_such_folder", "no folder no_such_folder"),
        ("--colour", "unrecognized arguments: --colour"),
    ],
)
def test_refuses(cluster, capsys, options, reason):
    with pytest.raises(SystemExit) as stop:
        cluster.parse_args(options.split())
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


def test_says_why_links_are_not_limited(network, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "only root" in network.obstacle()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(network.shutil, "which", lambda tool: None)
    assert "ip and tc not found" in network.obstacle()


def test_port_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(tmp_path, "--rates", "--port", str(port))
        printed, _ = process.communicate()
    assert process.returncode == 1, printed
    assert f"port {port} is in use" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("how", ["left", "failed", "unfinished"])
def test_network_leaves_nothing_behind(limited, network, monkeypatch, how):
    pid, folder = os.getpid(), network.HOSTS_FILES.exists()

    class Failure(Exception):
        pass

    def fail(*arguments):
        raise Failure

    if how == "unfinished":
        monkeypatch.setattr(network, "_name_host", fail)
    try:
        with limited("1gbit", 3) as (hosts, address, _):
            assert address == "10.77.0.1:47000"
            assert len(namespaces(pid)) == 4 + 3  # with the bridge's; hosts files
            ping = [*hosts[2].command, "cat", "/etc/hosts"]
            text = subprocess.run(ping, capture_output=True, text=True).stdout
            assert f"10.77.0.3 {socket.gethostname()}" in text
            if how == "failed":
                raise Failure
    except Failure:
        assert how != "left"
    assert namespaces(pid) == []
    assert network.HOSTS_FILES.exists() == folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_behind(limited, tmp_path, number):
    process = start(tmp_path, "--rates", "100mbit", "--kill", "--methods", "dense")
    deadline = time.monotonic() + 120
    while len(workers(tmp_path)) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    assert len(namespaces(process.pid)) == 3 + 2
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, printed
    deadline = time.monotonic() + 120
    while workers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)  # killed, and on a busy machine not gone yet
    assert namespaces(process.pid) == [] and workers(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_killed_hard_it_leaves_no_workers_and_the_next_one_sweeps(
    limited, network, tmp_path, monkeypatch
):
    process = start(tmp_path, "--rates", "100mbit", "--kill", "--methods", "dense")
    deadline = time.monotonic() + 120
    while len(workers(tmp_path)) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 120
    while workers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers(tmp_path) == []
    assert namespaces(process.pid) and list(tmp_path.iterdir())
    monkeypatch.setattr(network.tempfile, "tempdir", str(tmp_path))
    with limited("1gbit", 1):
        assert namespaces(process.pid) == []
        assert list(tmp_path.iterdir()) == []


def test_the_coordinator_listens_on_the_loopback_alone(cluster, network, tmp_path):
    arguments = "cluster_jax.py", network.localhost(2), ["dense"], cluster.ENDLESS, 1
    with cluster.cluster_fleet.fleet(*arguments, str(tmp_path)) as processes:
        deadline = time.monotonic() + 120
        while not all(w.warm for w in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        port = int(arguments[1].address.rpartition(":")[2])
        found = listening(port)
    # 127.0.0.1 as the kernel writes it, of version 4 or in one of version 6
    assert found and all(address.endswith("0100007F") for address in found), found


def listening(port):
    """The addresses, in hexadecimal, at which somebody listens on a port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        path = Path(table)
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found


def test_a_worker_is_root_only_where_nobody_else_could_be(limited, network):
    """Root makes the namespaces; whoever may read the files computes in them."""
    drop, owner = network.unprivileged()
    with limited("1gbit", 1) as made:
        command = [*made.hosts[0].command, "id", "-u"]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert made.owner == owner
    assert int(found.stdout) == (owner[0] if drop else 0)


def test_a_failing_worker_is_quoted(cluster, network, tmp_path):
    """And the other, which waits for it, is ended."""
    hosts = network.localhost(2)
    fleet, cache = cluster.cluster_fleet.fleet, str(tmp_path)
    with (
        pytest.raises(network.ClusterError, match="KeyError: 'no such method'"),
        fleet("cluster_jax.py", hosts, ["no such method"], 4, 1, cache) as processes,
    ):
        cluster.cluster_fleet.await_results(processes)
    assert all(worker.process.poll() is not None for worker in processes)


def test_two_processes_on_localhost(tmp_path):
    methods = ["dense", "sign"]
    options = "--steps", "5", "--rounds", "1", "--batch", "1", "--methods", *methods
    process = start(tmp_path, "--rates", *options)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["cluster.json", "cluster.png"]
    rows = json.loads((tmp_path / "cluster.json").read_text())["results"]["localhost"]
    assert list(rows) == methods
    assert rows["dense"]["hlo_bytes"] == 4 * PARAMETERS
    assert rows["sign"]["hlo_bytes"] == pytest.approx(PARAMETERS / 8, rel=0.05)
    assert all(0 < row["loss"] < 5 and row["step_seconds"] > 0 for row in rows.values())
    assert workers(tmp_path) == []


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_the_others_end_when_a_worker_is_gone(cluster, network, tmp_path, how):
    """Long before JAX's own 100 seconds without a heartbeat."""
    arguments = "cluster_jax.py", network.localhost(2), ["dense"], cluster.ENDLESS, 1
    with cluster.cluster_fleet.fleet(*arguments, str(tmp_path)) as processes:
        ((seconds, code, error),) = cluster.cluster_fleet.outage(processes, how)
    assert seconds is not None and seconds < 60
    assert code != 0
    assert "Gloo" in error if how == "killed" else "heartbeat" in error
