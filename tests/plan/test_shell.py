"""`python -m efopt.wire`: the same plans from a shell."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import efopt
from efopt import wire
from efopt.wire.__main__ import main
from efopt.wire.expression import FACTORIES, compressor

S = jax.ShapeDtypeStruct


def printed(capsys, *argv):
    main(["plan", *argv])
    return capsys.readouterr().out


def test_module_runs_from_a_shell():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "efopt.wire", "plan", "scaled_sign(64)"),
            *("--parameters", "1e4", "--workers", "8"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    plan = wire.plan(efopt.scaled_sign(64), [S((10_000,), jnp.float32)], num_workers=8)
    assert done.stdout == f"{plan}\n"


def test_options_are_those_of_the_function(capsys):
    out = printed(
        capsys,
        *("power_sgd(rank=2)", "--shapes", "64x32", "7", "--dtype", "bfloat16"),
        *("--workers", "4", "--exchange", "all_reduce", "--bandwidth", "125MB/s"),
        *("--latency", "50us", "--compute", "20ms", "--compress", "1e-3s"),
        *("--platform", "tpu", "--topology", "v5e:2x4"),
    )
    expected = wire.plan(
        efopt.power_sgd(rank=2),
        [S((64, 32), jnp.bfloat16), S((7,), jnp.bfloat16)],
        num_workers=4,
        exchange="all_reduce",
        bandwidth=1e9,
        latency=50e-6,
        compute_seconds=20e-3,
        compress_seconds=1e-3,
        platform="tpu",
        topology="v5e:2x4",
    )
    assert out == f"{expected}\n"


@pytest.mark.parametrize(
    ("text", "bits"), [("1Gbit/s", 1e9), ("1.5e2 Mbit/s", 1.5e8), ("3kB/s", 24e3)]
)
def test_bandwidth_has_units(capsys, text, bits):
    tail = ("--parameters", "100", "--workers", "2", "--bandwidth", text)
    plan = wire.plan(
        efopt.sign(), [S((100,), jnp.float32)], num_workers=2, bandwidth=bits
    )
    assert printed(capsys, "sign()", *tail) == f"{plan}\n"


def test_the_documentation_shows_what_it_prints(capsys):
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "explanation" / "bytes.md").read_text()
    blocks = re.findall(
        r"```sh\npython -m efopt.wire (.*?)```\n```text\n(.*?)```", page, re.S
    )
    (command, shown), *_ = blocks
    main(shlex.split(command.replace("\\\n", " ")))
    assert capsys.readouterr().out == shown


GOOD = ["sign()", "--parameters", "100", "--workers", "2"]
REFUSED = {
    "command": ([], "command"),
    "no size": (["plan", *GOOD[:1], "--workers", "2"], "--parameters --shapes"),
    "part of a parameter": (["plan", "sign()", "--parameters", "1.5"], "'1.5' is no"),
    "endless": (["plan", "sign()", "--parameters", "inf"], "'inf' is no number"),
    "shape": (["plan", "sign()", "--shapes", "3y4"], "'3y4' is no shape"),
    "rate": (["plan", *GOOD, "--bandwidth", "1e9"], "is no bandwidth such as 1Gbit/s"),
    "no rate": (["plan", *GOOD, "--bandwidth", "0bit/s"], "must be a positive number"),
    "time": (["plan", *GOOD, "--latency", "5"], "'5' is no time such as 50us"),
    "workers": (["plan", *GOOD[:3], "--workers", "0"], "below 2**31, got 0"),
    "too many": (["plan", *GOOD[:3], "--workers", "9" * 11], "got 99999999999"),
    "rows": (["plan", "count_sketch(width=2, rows=65)", *GOOD[1:]], "be below 65"),
    "exchange": (["plan", *GOOD, "--exchange", "ring"], "invalid choice: 'ring'"),
    "platform": (["plan", *GOOD, "--platform", "npu"], "invalid choice: 'npu'"),
    "topology": (
        ["plan", *GOOD, "--platform", "tpu", "--topology", "x"],
        "such as \"v5e:8x8\"; got 'x'",
    ),
    "compressor": (["plan", "zip()", *GOOD[1:]], "no `zip`; there are"),
}


@pytest.mark.parametrize(("argv", "says"), REFUSED.values(), ids=REFUSED)
def test_a_command_that_cannot_be_is_refused(capsys, argv, says):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "made",
    [
        efopt.scaled_sign(1024),
        efopt.power_sgd(rank=4),
        efopt.top_k(fraction=0.01),
        efopt.compose(efopt.top_k(k=64), efopt.quantize(bits=4)),
        efopt.compressors.partition(
            {"a": efopt.sign(), "b": efopt.compressors.identity()}, ["a", "b"]
        ),
    ],
    ids=repr,
)
def test_what_a_compressor_prints_is_read_back(made):
    assert compressor(repr(made)) == made


def test_every_public_compressor_can_be_written():
    shelf = vars(efopt.compressors).items()
    public = {name for name, made in shelf if made in FACTORIES.values()}
    assert public == set(FACTORIES) and {"sign", "compose", "partition"} <= public
    assert compressor("efopt.sign()") == efopt.sign()


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "sign().codec",
        "(lambda: 1)()",
        "[sign() for _ in range(9)]",
        "scaled_sign(1 if True else 2)",
        "scaled_sign(**{'block_size': 8})",
        "scaled_sign(open('x'))",
        "sign(",
        "sign",
        "1024",
        "",
        "scaled_sign(-1)",
        "scaled_sign(no_option=1)",
        pytest.param("x." * 10**5, id="long"),
        pytest.param("-" * 4000 + "1", id="deep"),
        pytest.param("(" * 4000, id="deeper"),
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="compressor") as caught:
        compressor(text)
    assert len(str(caught.value)) < 5000
