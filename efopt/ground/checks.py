"""Argument checks, worded alike for every factory."""

import dataclasses
import functools
import inspect
import math
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from efopt.ground import options as allowed

F = TypeVar("F", bound=Callable[..., Any])
_FACTORIES: set[str] = set()  # the names of all functions with options


def keyword_only(function: F) -> F:
    """A factory whose options are checked by name.

    It names the keyword where an option was passed by position, and refuses what an
    option of this name cannot be anywhere (:mod:`efopt.ground.options`). What a part
    refuses that the factory makes with its own options, the factory refuses.
    """
    parameters = inspect.signature(function).parameters
    options = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    most = len(parameters) - len(options)
    names = list(parameters)
    _FACTORIES.add(function.__name__)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if len(args) > most:
            api, name = function.__name__, options[0]
            before = "..., " if most else ""
            raise TypeError(
                f"`{api}` takes `{name}` by keyword, as all of its options: write "
                f"`{api}({before}{name}={args[most]!r})`."
            )
        given = dict(zip(names, args, strict=False)) | kwargs
        for name in given.keys() & parameters.keys():
            default = parameters[name].default
            allowed.check(function.__name__, name, given[name], default)
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            # Else it was told whom to name, or what failed was made by others.
            if not parameters.keys() & {"api", "scheme"}:
                _rename(error, function.__name__)
            raise

    return checked  # type: ignore[return-value]


def _rename(error: Exception, api: str) -> None:
    """Puts the function that was called in the place of the part that it is made of."""
    said = str(error)
    part = re.match(r"`(\w+)", said)
    if part and part[1] in _FACTORIES:
        error.args = (f"`{api}{said[part.end() :]}",)


def static_int(
    api: str, name: str, value: Any, *, least: int = 1, below: int | None = None
) -> int:
    """``value`` if it is a Python int in range, or a reasoned error."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"`{api}({name}=...)` must be a Python int, because it fixes shapes or the "
            f"program; got {type(value).__name__}. With `optax.inject_hyperparams` "
            f"pass `static_args=('{name}',)`."
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


def static_float(api: str, name: str, value: Any) -> float:
    """``value`` if it is a finite Python number of at least 0, or a reasoned error."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"`{api}({name}=...)` must be a Python number, because it chooses the "
            f"program; got {type(value).__name__}. With `optax.inject_hyperparams` "
            f"pass `static_args=('{name}',)`."
        )
    if not 0 <= value <= sys.float_info.max:
        raise ValueError(
            f"`{api}({name}=...)` must be finite and at least 0, got {value}."
        )
    return value


def share(api: str, name: str, value: Any) -> None:
    """Raises unless ``value`` is a Python number in [0, 1]."""
    if static_float(api, name, value) > 1:
        raise ValueError(f"`{api}({name}=...)` must be in [0, 1], got {value}.")


def decay(api: str, name: str, value: Any) -> None:
    """Raises unless a decay is in [0, 1); what is traced cannot be asked."""
    if value is None or (isinstance(value, int | float) and not 0 <= value < 1):
        raise ValueError(f"`{api}({name}=...)` must be in [0, 1), got {value}.")


def choice(api: str, name: str, value: Any, choices: tuple[Any, ...]) -> str:
    """``value`` if it is one of ``choices``, or a reasoned error."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`{api}({name}=...)` must be one of {', '.join(map(repr, choices))}, got "
            f"{value!r}."
        )
    return value


def block_size(api: str, value: Any) -> int | None:
    """A block size: ``None`` or a Python int of at least 1."""
    return None if value is None else static_int(api, "block_size", value)


@dataclasses.dataclass(frozen=True, eq=False)
class Scalar:
    """A number, a schedule or a traced value, for a field of a hashable codec.

    Numbers compare by value; schedules and arrays, which have no hash of their own, by
    identity.
    """

    value: Any

    def at(self, step: jax.Array) -> jax.Array:
        """The value at a step, a float array of shape ``()``."""
        value = self.value(step) if callable(self.value) else self.value
        return jnp.asarray(value, jnp.float32)

    def _key(self) -> Any:
        return self.value if isinstance(self.value, float) else id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scalar) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return repr(self.value)


def scalar(api: str, name: str, value: Any) -> Scalar:
    """A number of at least zero, a schedule, or an array of shape ``()``."""
    if isinstance(value, bool | str) or value is None:
        raise TypeError(
            f"`{api}({name}=...)` must be a number, a schedule or a scalar array, got "
            f"{value!r}."
        )
    if isinstance(value, int | float):
        if not 0 <= value <= sys.float_info.max:
            raise ValueError(
                f"`{api}({name}=...)` must be finite and at least 0, got {value}."
            )
        return Scalar(float(value))
    array = hasattr(value, "dtype") and not jnp.iscomplexobj(value)
    if not callable(value) and not (array and jnp.shape(value) == ()):
        raise TypeError(
            f"`{api}({name}=...)` must be a number, a schedule or a scalar array, got "
            f"{value!r}."
        )
    return Scalar(value)


def composed(outer: str, values: Any) -> str:
    """The expression that makes a codec whose values another codec writes."""
    inner = repr(values)
    return outer if inner == "identity()" else f"compose({outer}, {inner})"


def sparsity(
    api: str, fraction: Any, k: Any, block: int | None, name: str = "k"
) -> None:
    """Checks that exactly one of ``fraction`` and ``k`` is given, and its range.

    ``name`` is what the factory calls ``k``.
    """
    if (fraction is None) == (k is None):
        raise ValueError(
            f"`{api}` takes exactly one of `fraction` and `{name}`, got "
            f"{fraction=} and {name}={k!r}."
        )
    if k is not None:
        static_int(api, name, k)
        if block is not None and k > block:
            raise ValueError(
                f"`{api}({name}=...)` is counted per block and must not exceed "
                f"`block_size`, got {name}={k} with block_size={block}."
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


def numbered(codec: str, shape: tuple[int, ...], size: int) -> None:
    """Checks that 32 bits can number the coordinates of a block of a leaf."""
    if size >= 2**31:
        raise ValueError(
            f"`{codec}` numbers the coordinates of a block in 32 bits, and a leaf of "
            f"shape {shape} has {size} of them in one. Pass a `block_size`, such as "
            "2**20."
        )


def kept(fraction: float | None, k: int | None, size: int) -> int:
    """Coordinates kept of a block of ``size``: at least one, at most all."""
    if k is None:
        assert fraction is not None
        k = max(1, math.ceil(fraction * size * (1 - 1e-12)))
    return min(k, size)
