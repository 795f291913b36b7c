"""The one table of every public compressor; tests read its flags, never its names."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

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
      random: Whether its output depends on the step, and on an option `seed`.
      says_zero: Whether its wire can say zero, so that a leaf of zeros stays zero.
      published: Whether there is a paper to refer to.
      oracle: `tests/oracle.py`'s word on one leaf in float64, `(x, mask) -> C(x)`;
        `mask` is what the compressor makes of ones, for those that draw coordinates.
    """

    name: str
    factory: Callable[..., efopt.Compressor]
    options: Mapping[str, Any]
    exchanges: tuple[str, ...]
    static_args: tuple[str, ...] = ()
    random: bool = False
    says_zero: bool = True
    published: bool = True
    oracle: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

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


def _random_k(name: str, **options: Any) -> Row:
    block_size = options.get("block_size")

    def masked(x, mask):
        indices = [np.flatnonzero(b) for b in oracle.split_blocks(mask, block_size)]
        return oracle.mask_k(x, indices, block_size)

    exchanges = ("all_reduce", "all_gather", "two_phase")
    return Row(
        name,
        efopt.random_k,
        options,
        exchanges if "block_size" in options else exchanges[:2],
        static_args=("fraction", "k", "block_size", "seed"),
        random=True,
        oracle=masked,
    )


ROWS = (
    Row(
        "identity",
        efopt.identity,
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
    _scaled_sign("scaled_sign_1024", 1024),
    _top_k("top_k_3", k=3),
    _top_k("top_k_10pct", fraction=0.1),
    _top_k("top_k_30pct_16", fraction=0.3, block_size=16),
    _random_k("random_k_3", k=3),
    _random_k("random_k_10pct", fraction=0.1),
    _random_k("random_k_30pct_16", fraction=0.3, block_size=16),
)
