"""The one table of every public compressor; tests read its flags, never its names."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import oracle

import efopt

EXCHANGES = ("all_reduce", "all_gather", "two_phase", "majority_vote")


@dataclasses.dataclass(frozen=True)
class Row:
    """One compressor, and what the tests may demand of it.

    Attributes:
      name: The id of its tests.
      factory: The public function that makes it.
      options: The factory's arguments.
      exchanges: Those that can carry it; the first is its default.
      static_args: What `optax.inject_hyperparams` must not trace.
      random: Whether its output depends on the step and on a seed.
      reseeded: The options that choose another seed.
      one_message: Whether it has a single payload, for `compress` and `decompress`.
      largest: The magnitude up to which its factors hold.
      says_zero: Whether its wire can say zero, so that a leaf of zeros stays zero.
      published: Whether there is a paper to refer to.
      slow: Whether it is one more variant, tested by `pytest -m slow`.
      oracle: `tests/oracle.py`'s word on one leaf in float64, `(x, mask) -> C(x)`;
        `mask` is what the compressor makes of ones, for those that draw coordinates.
      neighbours: For those that round: `tests/oracle.py`'s word on the two values,
        `(x) -> (low, high)`, between which each coordinate may be rounded.
    """

    name: str
    factory: Callable[..., efopt.Compressor]
    options: Mapping[str, Any]
    exchanges: tuple[str, ...]
    static_args: tuple[str, ...] = ()
    random: bool = False
    reseeded: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"seed": 1})
    one_message: bool = True
    largest: float = float(np.finfo(np.float32).max)
    says_zero: bool = True
    published: bool = True
    slow: bool = False
    oracle: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    neighbours: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None

    def make(self, **changes: Any) -> efopt.Compressor:
        return self.factory(**{**self.options, **changes})


def _scaled_sign(name: str, block_size: int | None) -> Row:
    return Row(
        name,
        efopt.scaled_sign,
        {"block_size": block_size},
        ("all_gather",) if block_size is None else ("all_gather", "two_phase"),
        static_args=("block_size",),
        oracle=lambda x, mask: oracle.scaled_sign(x, block_size),
    )


def _top_k(name: str, **options: Any) -> Row:
    return Row(
        name,
        efopt.top_k,
        options,
        ("all_gather", "two_phase") if "block_size" in options else ("all_gather",),
        static_args=("fraction", "k", "block_size"),
        oracle=lambda x, mask: oracle.top_k(x, **options),
    )


def _shared(name: str, factory: Any, **options: Any) -> Row:
    block_size = options.get("block_size")

    def masked(x, mask):
        indices = [np.flatnonzero(b) for b in oracle.split_blocks(mask, block_size)]
        kept = oracle.mask_k(x, indices, block_size)
        return kept * np.max(mask, initial=0)  # an unbiased one scales what it sends

    exchanges = ("all_reduce", "all_gather", "two_phase")
    return Row(
        name,
        factory,
        options,
        exchanges if "block_size" in options else exchanges[:2],
        static_args=("fraction", "k", "block_size", "unbiased", "seed"),
        random=True,
        largest=1e37 if options.get("unbiased") else Row.largest,
        oracle=masked,
    )


def _uniform(name: str, factory: Any, grid: int, random: bool, **options: Any) -> Row:
    block_size, scale = options.get("block_size"), options.get("scale", "absmax")
    if factory is efopt.compressors.qsgd:
        scale = "l2"
    return Row(
        name,
        factory,
        options,
        ("all_gather",) if block_size is None else ("all_gather", "two_phase"),
        static_args=tuple(inspect.signature(factory).parameters),
        random=random,
        largest=1e38 if scale == "l2" else Row.largest,
        neighbours=lambda x: oracle.uniform_levels(x, grid, block_size, scale),
    )


def _cast(dtype: str) -> Row:
    return Row(
        f"cast_{dtype}",
        efopt.compressors.cast,
        {"dtype": dtype, "block_size": 32},
        ("all_gather", "two_phase"),
        static_args=("dtype", "block_size"),
        neighbours=lambda x: (oracle.cast(x, dtype, 32),) * 2,
    )


def _power_sgd(name: str, **options: Any) -> Row:
    return Row(
        name,
        efopt.power_sgd,
        options,
        ("all_reduce", "all_gather"),
        static_args=tuple(inspect.signature(efopt.power_sgd).parameters),
        random=not options.get("warm_start", True),
        one_message=False,
        largest=1e37,
    )


def _composed(name: str, outer: efopt.Compressor, inner: efopt.Compressor) -> Row:
    return Row(
        name,
        efopt.compose,
        {"outer": outer, "inner": inner},
        ("all_gather",),
        one_message="power_sgd" not in name,
        published=False,
    )


def by_size(tree: Any) -> Any:
    """Labels for a partition: what is worth compressing, and the rest."""
    return jax.tree.map(lambda x: "large" if np.size(x) > 16 else "small", tree)


ROWS = (
    Row(
        "identity",
        efopt.compressors.identity,
        {},
        ("all_reduce", "all_gather"),
        published=False,
        oracle=lambda x, mask: oracle.identity(x),
    ),
    Row(
        "sign",
        efopt.sign,
        {},
        ("all_gather", "two_phase", "majority_vote"),
        says_zero=False,
        oracle=lambda x, mask: oracle.sign(x),
    ),
    _scaled_sign("scaled_sign", None),
    _scaled_sign("scaled_sign_8", 8),
    _top_k("top_k_3", k=3),
    _top_k("top_k_30pct_16", fraction=0.3, block_size=16),
    Row(
        "threshold",
        efopt.compressors.threshold,
        {"threshold": 0.5, "fraction": 0.3, "block_size": 16},
        ("all_gather", "two_phase"),
        static_args=("fraction", "k", "block_size"),
        oracle=lambda x, mask: oracle.threshold(x, 0.5, fraction=0.3, block_size=16),
    ),
    _shared("random_k_3", efopt.random_k, k=3),
    _shared("random_k_30pct_16", efopt.random_k, fraction=0.3, block_size=16),
    _shared("random_k_unbiased", efopt.random_k, fraction=0.3, unbiased=True),
    _shared("random_block_10pct", efopt.random_block, fraction=0.1),
    _shared(
        "random_block_unbiased",
        efopt.random_block,
        k=5,
        block_size=16,
        unbiased=True,
    ),
    _uniform("quantize_8", efopt.quantize, 127, False, bits=8, block_size=128),
    _uniform("quantize_4", efopt.quantize, 7, True, bits=4, block_size=64),
    _uniform(
        "quantize_3_l2", efopt.quantize, 3, True, bits=3, block_size=16, scale="l2"
    ),
    _uniform("qsgd", efopt.compressors.qsgd, 7, True, levels=7, block_size=32),
    _uniform("terngrad", efopt.compressors.terngrad, 1, True, block_size=None),
    _cast("bfloat16"),
    _cast("float16"),
    _cast("float8_e4m3fn"),
    _cast("float8_e5m2"),
    Row(
        "natural",
        efopt.compressors.natural,
        {},
        ("all_gather", "two_phase"),
        static_args=("seed",),
        random=True,
        largest=2.0**127,
        neighbours=oracle.powers_of_two,
    ),
    Row(
        "count_sketch",
        efopt.compressors.count_sketch,
        {"fraction": 0.4},
        ("all_reduce", "all_gather"),
        static_args=("width", "fraction", "rows", "block_size", "seed"),
        random=True,
        largest=1e38,
    ),
    Row(
        "count_sketch_random",
        efopt.compressors.count_sketch,
        {"fraction": 0.4, "hash": "random"},
        ("all_reduce", "all_gather"),
        static_args=("width", "fraction", "rows", "block_size", "seed"),
        random=True,
        largest=1e37,  # any number of coordinates may share a counter
    ),
    _power_sgd("power_sgd", rank=1),
    _power_sgd("power_sgd_cold", rank=2, warm_start=False),
    _composed("top_k_of_8_bits", efopt.top_k(fraction=0.2), efopt.quantize(8)),
    _composed(
        "power_sgd_of_bfloat16", efopt.power_sgd(1), efopt.compressors.cast("bfloat16")
    ),
    Row(
        "partition",
        efopt.compressors.partition,
        {
            "compressors": {"large": efopt.power_sgd(1), "small": efopt.scaled_sign(8)},
            "labels": by_size,
        },
        ("all_reduce", "all_gather", "two_phase"),
        static_args=("compressors", "labels"),
        one_message=False,
        published=False,
    ),
)

# Whole leaves, blocks, shared random coordinates, rounds with a memory.
KINDS = {"top_k_of_8_bits", "scaled_sign_8", "random_block_10pct", "power_sgd"}

# One more variant of what another row tests.
SLOW = {
    "top_k_3",
    "random_k_30pct_16",
    "random_k_unbiased",
    "random_block_unbiased",
    "quantize_8",
    "quantize_3_l2",
    "cast_float16",
    "cast_float8_e4m3fn",
    "cast_float8_e5m2",
    "count_sketch_random",
    "power_sgd_cold",
    "power_sgd_of_bfloat16",
}
ROWS = tuple(dataclasses.replace(r, slow=r.name in SLOW) for r in ROWS)
