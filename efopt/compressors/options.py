"""Checks of the options that fix an array's shape, worded alike for every factory."""

import math
from typing import Any


def static_int(
    api: str, name: str, value: Any, *, least: int = 1, below: int | None = None
) -> int:
    """``value`` if it is a Python int in range, or a reasoned error."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"`{api}({name}=...)` must be a Python int, because it fixes an array "
            f"shape; got {type(value).__name__}. With `optax.inject_hyperparams` pass "
            f"`static_args=('{name}',)`."
        )
    if value < least:
        raise ValueError(f"`{api}({name}=...)` must be at least {least}, got {value}.")
    if below is not None and value >= below:
        raise ValueError(f"`{api}({name}=...)` must be below {below}, got {value}.")
    return value


def seed(api: str, value: Any) -> int:
    """A seed: a Python int of 32 bits."""
    return static_int(api, "seed", value, least=0, below=2**32)


def static_bool(api: str, name: str, value: Any) -> bool:
    """``value`` if it is a Python bool, or a reasoned error."""
    if not isinstance(value, bool):
        raise TypeError(
            f"`{api}({name}=...)` must be a Python bool, because it chooses the "
            f"program; got {type(value).__name__}. With `optax.inject_hyperparams` "
            f"pass `static_args=('{name}',)`."
        )
    return value


def choice(api: str, name: str, value: Any, choices: tuple[str, ...]) -> str:
    """``value`` if it is one of ``choices``, or a reasoned error."""
    if value not in choices:
        raise ValueError(
            f"`{api}({name}=...)` must be one of {', '.join(map(repr, choices))}, got "
            f"{value!r}."
        )
    return value


def block_size(api: str, value: Any) -> int | None:
    """A block size: ``None`` or a Python int of at least 1."""
    return None if value is None else static_int(api, "block_size", value)


def sparsity(api: str, fraction: Any, k: Any, block: int | None) -> None:
    """Checks that exactly one of ``fraction`` and ``k`` is given, and its range."""
    if (fraction is None) == (k is None):
        raise ValueError(
            f"`{api}` takes exactly one of `fraction` and `k`, got "
            f"{fraction=} and {k=}."
        )
    if k is not None:
        static_int(api, "k", k)
        if block is not None and k > block:
            raise ValueError(
                f"`{api}(k=...)` counts coordinates per block and must not exceed "
                f"`block_size`, got {k=} with block_size={block}."
            )
        return
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise TypeError(
            f"`{api}(fraction=...)` must be a Python float, because it fixes an array "
            f"shape; got {type(fraction).__name__}. With `optax.inject_hyperparams` "
            "pass `static_args=('fraction',)`."
        )
    if not 0 < fraction <= 1:
        raise ValueError(f"`{api}(fraction=...)` must lie in (0, 1], got {fraction=}.")


def kept(fraction: float | None, k: int | None, size: int) -> int:
    """Coordinates kept of a block of ``size``: at least one, at most all."""
    if k is None:
        assert fraction is not None
        k = max(1, math.ceil(fraction * size * (1 - 1e-12)))
    return min(k, size)
