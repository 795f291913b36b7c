"""Every option of every public function, with values that it cannot have.

Either the value is refused when the transformation is made or first traced, in the
library's own words, which name the option and the function that was called; or it is
among those that are taken on purpose.
"""

import inspect
import re
import traceback
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import efopt

HOME = str(Path(efopt.__file__).parent)
PARAMS = {"b": np.ones(5, np.float32), "w": np.ones((4, 6), np.float32)}
SHELVES = (
    efopt,
    efopt.compressors,
    efopt.convex,
    efopt.exchanges,
    efopt.feedback,
    efopt.optimizers,
    efopt.outer,
    efopt.watch,
)
# What stands where an option is required, or where another one needs company.
GIVEN = {
    "api": "scheme",
    "alpha": 0.5,
    "beta": 0.5,
    "compressor": efopt.scaled_sign(8),
    "compressors": {"a": efopt.sign()},
    "dtype": "bfloat16",
    "every": 2,
    "inner": optax.sgd(0.1),
    "inner_learning_rate": 0.1,
    "labels": "a",
    "learning_rate": 0.1,
    "memory": efopt.quantize(8),
    "outer": optax.sgd(0.1),
    "outer_learning_rate": 0.7,
    "probability": 0.5,
    "reference_grads": PARAMS,
    "shift_compressor": efopt.random_k(fraction=0.5, unbiased=True),
    "smoothness": 1.0,
    "strong_convexity": 0.1,
    "threshold": 0.5,
    "warmup": 2,
    "freeze": 2,
}
COMPANY = {
    "hierarchical": {"fast": "fast"},
    "accumulate": {"axis_name": "data"},
    "per_worker": {"axis_name": "data"},
    "diana": {"compressor": efopt.random_k(fraction=0.5, unbiased=True)},
    "ec_sgd_diana": {},
    "compose": {"outer": efopt.top_k(k=1), "inner": efopt.quantize(8)},
    "econtrol": {"memory": None},
    "random_block": {"k": 1},
    "random_k": {"k": 1},
    "top_k": {"k": 1},
    "threshold": {"k": 1},
    "dct_top_k": {"k": 1},
    "arc_top_k": {"fraction": 0.1},
    "count_sketch": {"fraction": 0.1},
    "zero_one_adam": {"longest": 2, "doubling": 2},
    "local_steps": {
        "outer": efopt.error_feedback(efopt.sign(), axis_name="data"),
        "axis_name": "data",
    },
}


class Strange:
    """An object of no use."""


BAD = {
    "text": "x",
    "nan": float("nan"),
    "infinite": float("inf"),
    "complex": 1j,
    "strange": Strange(),
    "list": [1, 2],
    "huge": 10**400,
    "vector": np.ones(2, np.float32),
    "nothing": None,
}


def functions():
    found = {}
    for shelf in SHELVES:
        for name, thing in vars(shelf).items():
            public = inspect.isfunction(thing) and not name.startswith("_")
            if public and inspect.signature(thing).parameters:
                found.setdefault(name, thing)
    return found


FUNCTIONS = functions()


def call(function, option, value):
    given = {}
    for p in inspect.signature(function).parameters.values():
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD:
            given[p.name] = GIVEN.get(p.name)
    given.update(COMPANY.get(function.__name__, {}))
    if option is not None:
        given[option] = value
    return function(**given)


# What looks wrong and is taken on purpose, by option.
TAKEN = {
    "api": {"text"},
    "axis_name": {"text"},
    "fast": {"text"},
    "block_size": {"nothing"},
    "fragments": {"text", "list", "complex", "strange", "vector", "nan"},
    "exchange": {"nothing"},
    "labels": set(BAD),
    "momentum": {"nothing"},
    "reference_grads": {"list", "vector"},
    "reset": {"nothing"},
    "role": {"text"},
}
# Integers may be of any size.
SIZES = {
    *("block_size", "every", "freeze", "k", "max_consecutive", "min_compression"),
    *("rank", "refresh", "reset", "rows", "split", "start", "tile", "warmup", "width"),
}
# They need a place, a state or a step of their own: each has tests of its refusals.
ELSEWHERE = {
    "distribute",
    "local_params",
    "memory_report",
    "partition_specs",
    "report",
    "require_finite",
    "stack_workers",
    "value_and_grad",
    "virtual_params",
    "workers_agree",
    "require_agreement",
    "init_mean",
    "reduce_mean",
}


def faults(function, option):
    """What becomes of values that the option cannot have: a line for each fault."""
    options = inspect.signature(function).parameters
    default = options[option].default
    names = {function.__name__, *([GIVEN["api"]] if "api" in options else [])}
    for kind, value in BAD.items():
        taken = kind in TAKEN.get(option, ()) or (value is None and default is None)
        taken |= kind == "huge" and option in SIZES
        try:
            call(function, option, value)
        except (TypeError, ValueError) as error:
            last = traceback.extract_tb(error.__traceback__)[-1].filename
            named = re.search(rf"`[^`]*\b{option}\b[^`]*`", str(error))
            called = re.search(rf"`({'|'.join(names)})\b", str(error))
            if not (last.startswith(HOME) and named and called):
                yield f"{kind}: {type(error).__name__}: {str(error)[:80]}"
        except Exception as error:  # noqa: BLE001
            yield f"{kind}: {type(error).__name__}: {str(error)[:80]}"
        else:
            if not taken:
                yield f"{kind}: taken"


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - ELSEWHERE))
def test_options_are_refused_in_our_words_or_taken_on_purpose(name):
    call(FUNCTIONS[name], None, None)
    options = inspect.signature(FUNCTIONS[name]).parameters
    found = {option: list(faults(FUNCTIONS[name], option)) for option in options}
    assert not {option: lines for option, lines in found.items() if lines}


def test_traced_options_pass():
    """As `optax.inject_hyperparams` gives them."""

    def run(rate, decay):
        tx = efopt.ef_sgd(efopt.scaled_sign(), rate, weight_decay=decay)
        return tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]

    jax.eval_shape(run, np.float32(0.1), np.float32(0.0))
