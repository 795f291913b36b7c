"""``python -m efopt.wire plan``: what a configuration will send, from a shell.

python -m efopt.wire plan "scaled_sign(1024)" --parameters 25e6 --workers 16 \\
    --exchange two_phase --bandwidth 10Gbit/s
"""

import argparse
import re
from collections.abc import Sequence

import jax

from efopt.exchanges.table import EXCHANGES
from efopt.ground.dtypes import FLOATS
from efopt.wire.expression import compressor
from efopt.wire.plan import plan
from efopt.wire.target import PLATFORMS

_BITS = {"bit": 1, "B": 8}
_PREFIXES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


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
        help="as one vector, such as 25e6; a low-rank compressor needs --shapes",
    )
    size.add_argument(
        "--shapes", metavar="SHAPE", nargs="+", type=_shape, help="such as 512x10 10"
    )
    add("--dtype", default="float32", choices=FLOATS)
    add("--workers", type=int, required=True)
    add("--exchange", choices=tuple(EXCHANGES))
    add("--bandwidth", type=_rate, help="such as 1Gbit/s or 125MB/s")
    add("--latency", type=_seconds, default=0.0, help="such as 50us")
    add("--compute", type=_seconds, default=0.0, help="of a step, such as 120ms")
    add("--compress", type=_seconds, default=0.0, help="what compressing adds to it")
    add("--platform", choices=PLATFORMS)
    add("--topology", help="of a TPU, such as v5e:8x8")
    given = parser.parse_args(argv)
    shapes = given.shapes or [(given.parameters,)]
    params = [jax.ShapeDtypeStruct(shape, given.dtype) for shape in shapes]
    try:
        result = plan(
            compressor(given.compressor),
            params,
            num_workers=given.workers,
            exchange=given.exchange,
            bandwidth=given.bandwidth,
            latency=given.latency,
            compute_seconds=given.compute,
            compress_seconds=given.compress,
            platform=given.platform,
            topology=given.topology,
        )
    except (TypeError, ValueError) as error:
        command.error(str(error))
    print(result)


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
