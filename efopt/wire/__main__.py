"""``python -m efopt.wire plan``: what a configuration will send, from a shell.

python -m efopt.wire plan "scaled_sign(1024)" --parameters 25e6 --workers 16 \\
    --exchange two_phase --bandwidth 10Gbit/s

python -m efopt.wire plan "scaled_sign(1024)" --shapes 8192x8192 8192 \\
    --mesh dcn=4,fsdp=64 --slow dcn --specs fsdp none --bandwidth dcn=100Gbit/s \\
    --devices-per-card dcn=8
"""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec as P

from efopt.exchanges.table import EXCHANGES
from efopt.ground.dtypes import FLOATS
from efopt.hlo.networks import Network
from efopt.wire.expression import compressor
from efopt.wire.plan import plan
from efopt.wire.target import PLATFORMS

_BITS = {"bit": 1, "B": 8}
_PREFIXES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, plans, and prints."""
    parser = argparse.ArgumentParser(
        "python -m efopt.wire", description="What travels between workers."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "plan", help="what a configuration will send in a step, and whether it pays"
    )
    add = command.add_argument
    add("compressor", help='such as "scaled_sign(1024)"')
    size = command.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--parameters",
        metavar="COUNT",
        type=_count,
        help="as one vector, such as 25e6; a low-rank compressor needs --shapes. With "
        "--mesh sharded over all axes but the slow one, and padded to equal shards",
    )
    size.add_argument(
        "--shapes", metavar="SHAPE", nargs="+", type=_shape, help="such as 512x10 10"
    )
    add("--dtype", default="float32", choices=FLOATS)
    add("--workers", type=int, help="on a flat axis")
    add("--mesh", type=_by_axis(_size), help="instead of --workers: dcn=4,fsdp=64")
    add("--slow", metavar="AXIS", help="the axis of the workers, or several: dcn,pods")
    add(
        "--specs",
        metavar="SPEC",
        nargs="+",
        type=_spec,
        help="with --mesh, of each shape: fsdp none,fsdp fsdp+tensor none",
    )
    add("--exchange", choices=tuple(EXCHANGES))
    add(
        "--bandwidth",
        type=_perhaps_by_axis(_rate),
        help="such as 1Gbit/s or 125MB/s; with --mesh by axis, dcn=100Gbit/s, that of "
        "the slow one of a network card",
    )
    add(
        "--latency",
        type=_perhaps_by_axis(_seconds),
        help="such as 50us; with --mesh by axis, dcn=50us",
    )
    add("--devices-per-card", type=_by_axis(_size), help="with --mesh: dcn=8")
    add("--compute", type=_seconds, default=0.0, help="of a step, such as 120ms")
    add("--compress", type=_seconds, default=0.0, help="what compressing adds to it")
    add("--every", type=int, help="steps of a round, with local steps: 30")
    add("--fragments", type=int, help="with --every: meetings of a round")
    add("--platform", choices=PLATFORMS)
    add("--topology", help="of a TPU, such as v5e:8x8")
    given = parser.parse_args(argv)
    try:
        params, where = _on_a_mesh(given) if given.mesh else _flat(given)
        result = plan(
            compressor(given.compressor),
            params,
            **where,
            exchange=given.exchange,
            compute_seconds=given.compute,
            compress_seconds=given.compress,
            platform=given.platform,
            topology=given.topology,
            every=given.every,
            fragments=given.fragments,
        )
    except (TypeError, ValueError) as error:
        command.error(str(error))
    print(result)


def _flat(given: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Parameters, and arguments of a plan for a flat axis of workers."""
    for name in ("slow", "specs", "devices_per_card"):
        if getattr(given, name) is not None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} goes with --mesh, such as dcn=4,fsdp=64.")
    if given.workers is None:
        raise ValueError("one of --workers and --mesh is required.")
    for name in ("bandwidth", "latency"):
        if isinstance(getattr(given, name), dict):
            raise ValueError(f"--{name} by axis goes with --mesh.")
    shapes = given.shapes or [(given.parameters,)]
    return [jax.ShapeDtypeStruct(shape, given.dtype) for shape in shapes], {
        "num_workers": given.workers,
        "bandwidth": given.bandwidth,
        "latency": given.latency or 0.0,
    }


def _on_a_mesh(given: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Parameters, and arguments of a plan on a mesh."""
    if given.workers is not None:
        raise ValueError("--workers is of a flat axis; with --mesh it is left out.")
    if given.slow is None:
        raise ValueError("--mesh needs --slow, the axis of the workers, such as dcn.")
    slow = tuple(given.slow.split(","))
    times = {"bandwidth": given.bandwidth or {}, "latency": given.latency or {}}
    for name, value in times.items():
        if not isinstance(value, dict):
            raise ValueError(f"--{name} is by axis with --mesh, such as {slow[0]}=...")
    bandwidth, latency = times["bandwidth"], times["latency"]
    if given.shapes is None:
        inner = tuple(name for name in given.mesh if name not in slow)
        by = math.prod(given.mesh[name] for name in inner)
        shapes, specs = [(-(-given.parameters // by) * by,)], [P(inner)]
    else:
        shapes, specs = given.shapes, [P()] * len(given.shapes)
    if given.specs is not None:
        specs = given.specs
        if given.shapes is None or len(specs) != len(shapes):
            raise ValueError(f"--specs are one for each of --shapes, got {len(specs)}.")
    return [jax.ShapeDtypeStruct(shape, given.dtype) for shape in shapes], {
        "mesh": given.mesh,
        "axis_name": slow[0] if len(slow) == 1 else slow,
        "params_specs": specs,
        "networks": {
            name: Network(bandwidth.get(name), latency.get(name, 0.0))
            for name in {**bandwidth, **latency}
        },
        "devices_per_card": given.devices_per_card,
    }


def _by_axis(read: Callable[[str], T]) -> Callable[[str], dict[str, T]]:
    """Reads ``dcn=...,fsdp=...``."""

    def by_axis(text: str) -> dict[str, T]:
        pairs = [part.partition("=") for part in text.split(",")]
        if not all(name and equals for name, equals, _ in pairs):
            raise argparse.ArgumentTypeError(f"{text!r} is not by axis, such as dcn=4")
        return {name: read(value) for name, _, value in pairs}

    return by_axis


def _perhaps_by_axis(read: Callable[[str], T]) -> Callable[[str], T | dict[str, T]]:
    return lambda text: _by_axis(read)(text) if "=" in text else read(text)


def _size(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number, as in dcn=4")
    return int(text)


def _spec(text: str) -> P:
    entries = [tuple(entry.split("+")) for entry in text.split(",")]
    if not all(name.isidentifier() for entry in entries for name in entry):
        raise argparse.ArgumentTypeError(f"{text!r} is no spec such as none,fsdp+tp")
    return P(*(None if e == ("none",) else e[0] if len(e) == 1 else e for e in entries))


def _count(text: str) -> int:
    value = float(text)
    if not 1 <= value < 1e18 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of parameters")
    return int(value)


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape such as 512x10")
    return tuple(map(int, text.split("x")))


def _rate(text: str) -> float:
    found = re.fullmatch(r"([\d.e+]+) *([kMGT]?)(bit|B)/s", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no bandwidth such as 1Gbit/s or 125MB/s"
        )
    return float(found[1]) * _PREFIXES[found[2]] * _BITS[found[3]]


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([\d.e+-]+?) *(s|ms|us)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 50us or 0.1s")
    return float(found[1]) * _SECONDS[found[2]]


if __name__ == "__main__":
    main()
