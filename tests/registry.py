"""Four tables, one a role; tests read the flags of their rows, never the names.

COMPRESSORS: how an array becomes a payload. EXCHANGES: how payloads become an average.
SCHEMES: what stands in a chain before the learning rate. OPTIMIZERS: whole chains. A
new part of the library is one row here, and gets every test of its role.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
import oracle
import oracle_since
from proofs.changes import changes
from proofs.two_level import two_level

import efopt

AXIS = "data"

# ----------------------------------------------------------------- compressors


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
      kind: Whether it stands for a way to take a leaf apart: whole leaves, blocks,
        shared random coordinates, rounds with a memory.
      one_bit: Whether its payload is a sign a coordinate and nothing else, so that
        every exchange of signs can carry it.
      scales: The magnitudes of inputs on which it rounds to a neighbour.
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
    kind: bool = False
    one_bit: bool = False
    scales: tuple[float, ...] = (1.0, 1e-20, 1e20)
    slow: bool = False
    oracle: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    neighbours: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None

    def make(self, **changes: Any) -> efopt.Compressor:
        return self.factory(**{**self.options, **changes})


def _scaled_sign(name: str, block_size: int | None, **flags: Any) -> Row:
    return Row(
        name,
        efopt.scaled_sign,
        {"block_size": block_size},
        ("all_gather",) if block_size is None else ("all_gather", "two_phase"),
        static_args=("block_size",),
        oracle=lambda x, mask: oracle.scaled_sign(x, block_size),
        **flags,
    )


def _top_k(name: str, slow: bool = False, **options: Any) -> Row:
    return Row(
        name,
        efopt.top_k,
        options,
        ("all_gather", "two_phase") if "block_size" in options else ("all_gather",),
        static_args=("fraction", "k", "block_size", "tile"),
        oracle=lambda x, mask: oracle.top_k(x, **options),
        slow=slow,
    )


def _shared(
    name: str, factory: Any, slow: bool = False, kind: bool = False, **options: Any
) -> Row:
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
        slow=slow,
        kind=kind,
    )


def _uniform(
    name: str, factory: Any, grid: int, slow: bool = False, **options: Any
) -> Row:
    block_size, scale = options.get("block_size"), options.get("scale", "absmax")
    if factory is efopt.compressors.qsgd:
        scale = "l2"
    return Row(
        name,
        factory,
        options,
        ("all_gather",) if block_size is None else ("all_gather", "two_phase"),
        static_args=tuple(inspect.signature(factory).parameters),
        # Eight bits go to the nearest.
        random=grid < 127,
        slow=slow,
        largest=1e38 if scale == "l2" else Row.largest,
        neighbours=lambda x: oracle.uniform_levels(x, grid, block_size, scale),
    )


def _cast(dtype: str, **flags: Any) -> Row:
    return Row(
        f"cast_{dtype}",
        efopt.compressors.cast,
        {"dtype": dtype, "block_size": 32},
        ("all_gather", "two_phase"),
        static_args=("dtype", "block_size"),
        neighbours=lambda x: (oracle.cast(x, dtype, 32),) * 2,
        **flags,
    )


def _power_sgd(
    name: str, slow: bool = False, kind: bool = False, **options: Any
) -> Row:
    return Row(
        name,
        efopt.power_sgd,
        options,
        ("all_reduce", "all_gather"),
        static_args=tuple(inspect.signature(efopt.power_sgd).parameters),
        random=not options.get("warm_start", True),
        one_message=False,
        largest=1e37,
        slow=slow,
        kind=kind,
    )


def _composed(
    name: str, outer: efopt.Compressor, inner: efopt.Compressor, **flags: Any
) -> Row:
    return Row(
        name,
        efopt.compose,
        {"outer": outer, "inner": inner},
        ("all_gather",),
        published=False,
        **flags,
    )


def by_size(tree: Any) -> Any:
    """Labels for a partition: what is worth compressing, and the rest."""
    return jax.tree.map(lambda x: "large" if np.size(x) > 16 else "small", tree)


COMPRESSORS = (
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
        one_bit=True,
        oracle=lambda x, mask: oracle.sign(x),
    ),
    _scaled_sign("scaled_sign", None),
    _scaled_sign("scaled_sign_8", 8, kind=True),
    _top_k("top_k_3", k=3, slow=True),
    _top_k("top_k_30pct_16", fraction=0.3, block_size=16),
    Row(
        "top_k_tiles",
        efopt.top_k,
        {"k": 3, "tile": (4, 8)},
        ("all_gather", "two_phase"),
        static_args=("fraction", "k", "block_size", "tile"),
        oracle=lambda x, mask: oracle.tiled_top_k(x, 3, (4, 8)),
    ),
    Row(
        "two_magnitudes_16",
        efopt.compressors.two_magnitudes,
        {"block_size": 16},
        ("all_gather", "two_phase"),
        static_args=("block_size",),
        oracle=lambda x, mask: oracle.two_magnitudes(x, 16),
    ),
    Row(
        "threshold",
        efopt.compressors.threshold,
        {"threshold": 0.5, "fraction": 0.3, "block_size": 16},
        ("all_gather", "two_phase"),
        static_args=("fraction", "k", "block_size"),
        oracle=lambda x, mask: oracle.threshold(x, 0.5, fraction=0.3, block_size=16),
    ),
    _shared("random_k_3", efopt.random_k, k=3),
    _shared(
        "random_k_30pct_16", efopt.random_k, slow=True, fraction=0.3, block_size=16
    ),
    _shared(
        "random_k_unbiased", efopt.random_k, slow=True, fraction=0.3, unbiased=True
    ),
    _shared("random_block_10pct", efopt.random_block, kind=True, fraction=0.1),
    _shared(
        "random_block_unbiased",
        efopt.random_block,
        slow=True,
        k=5,
        block_size=16,
        unbiased=True,
    ),
    _uniform("quantize_8", efopt.quantize, 127, True, bits=8, block_size=128),
    _uniform("quantize_4", efopt.quantize, 7, bits=4, block_size=64),
    _uniform(
        "quantize_3_l2", efopt.quantize, 3, True, bits=3, block_size=16, scale="l2"
    ),
    _uniform("qsgd", efopt.compressors.qsgd, 7, levels=7, block_size=32),
    _uniform("terngrad", efopt.compressors.terngrad, 1, block_size=None),
    _cast("bfloat16"),
    _cast("float16", slow=True, scales=(1.0,)),
    _cast("float8_e4m3fn", slow=True),
    _cast("float8_e5m2", slow=True),
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
        slow=True,
        largest=1e37,  # any number of coordinates may share a counter
    ),
    _power_sgd("power_sgd", kind=True, rank=1),
    _power_sgd("power_sgd_cold", slow=True, rank=2, warm_start=False),
    Row(
        "arc_top_k",
        efopt.compressors.arc_top_k,
        {"fraction": 0.3, "rank": 2},
        ("all_reduce", "all_gather"),
        static_args=("fraction", "k", "rank", "width", "seed"),
        random=True,
        one_message=False,
        largest=1e37,
    ),
    Row(
        "arc_top_k_rows",
        efopt.compressors.arc_top_k,
        {"k": 2, "rank": 1, "width": 9},
        ("all_reduce", "all_gather"),
        static_args=("fraction", "k", "rank", "width", "seed"),
        random=True,
        one_message=False,
        largest=1e37,
        slow=True,
    ),
    Row(
        "dct_top_k",
        efopt.compressors.dct_top_k,
        {"k": 3, "tile": 8},
        ("all_gather",),
        static_args=("k", "tile"),
        largest=1e36,
        oracle=lambda x, mask: oracle_since.dct_top_k(x, 3, 8),
    ),
    _composed(
        "top_k_of_8_bits", efopt.top_k(fraction=0.2), efopt.quantize(8), kind=True
    ),
    _composed(
        "power_sgd_of_bfloat16",
        efopt.power_sgd(1),
        efopt.compressors.cast("bfloat16"),
        one_message=False,
        slow=True,
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


# ------------------------------------------------------------------- exchanges


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One way for payloads to become an average.

    Attributes:
      name: The id of its tests.
      make: Makes what is passed as ``exchange=``.
      carries: The name under which a row of COMPRESSORS lists it.
      operations: The collectives of a step of one message, in order of the alphabet.
      carrier: The type in which they travel.
      compressor: One that it carries and that draws nothing at random.
      says: `tests/oracle.py`'s word on a worker's message, for that compressor.
      keeps: Whether there is a second compression, with a residual of its own.
      votes: Whether the average is the sign of the sum of signs.
      alias: Whether its name alone will do.
      groups: The number of groups within which workers average first, if they do.
      axis_name: The axes of the workers.
    """

    name: str
    make: Callable[[], Any]
    carries: str
    operations: tuple[str, ...]
    carrier: str
    compressor: efopt.Compressor
    says: Callable[[np.ndarray], np.ndarray]
    keeps: bool = False
    votes: bool = False
    alias: bool = True
    groups: int | None = None
    axis_name: Any = AXIS


EXCHANGES = (
    Exchange(
        "all_reduce",
        efopt.exchanges.all_reduce,
        "all_reduce",
        ("all-reduce",),
        "f32",
        efopt.compressors.identity(),
        oracle.identity,
    ),
    Exchange(
        "all_gather",
        efopt.exchanges.all_gather,
        "all_gather",
        ("all-gather",),
        "u32",
        efopt.top_k(k=3),
        lambda x: oracle.top_k(x, k=3),
    ),
    Exchange(
        "two_phase",
        efopt.exchanges.two_phase,
        "two_phase",
        ("all-gather", "all-to-all"),
        "u32",
        efopt.scaled_sign(16),
        lambda x: oracle.scaled_sign(x, 16),
        keeps=True,
    ),
    Exchange(
        "majority_vote",
        efopt.exchanges.majority_vote,
        "majority_vote",
        ("all-gather", "all-to-all"),
        "u32",
        efopt.sign(),
        oracle.sign,
        votes=True,
    ),
    Exchange(
        "two_level",
        lambda: two_level("fast"),
        "all_gather",
        ("all-gather", "all-reduce"),
        "u32",
        efopt.top_k(k=3),
        lambda x: oracle.top_k(x, k=3),
        alias=False,
        groups=2,
        axis_name=("slow", "fast"),
    ),
    Exchange(
        "hierarchical",
        lambda: efopt.exchanges.hierarchical("fast"),
        "all_reduce",
        ("all-gather", "all-reduce", "all-reduce"),  # 150 coordinates on 4 devices
        "f32",
        efopt.compressors.identity(),
        oracle.identity,
        alias=False,
        groups=2,
        axis_name=("slow", "fast"),
    ),
)

# ------------------------------------------------------- schemes and optimizers

WORKERS = 4  # of the contract suite
SHAPES = {"b": (5,), "w": (16, 17)}  # of its parameters; a memory compresses `w`


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One transformation that meets other workers, or stands in front of one.

    Attributes:
      name: The id of its tests.
      factory: The public function that makes it.
      options: The factory's options, of the axis name.
      own: Whether a part of its state is each worker's own.
      owes: Whether a residual is among it, for `efopt.memory_report`.
      averages: Whether updates come out equal on all workers.
      alone: Whether there is a form for a single worker, without an axis.
      over_workers: Whether there is a form for several.
      functions: Whether it takes the gradients as functions, `grad_fn=...`.
      moves: By which step parameters have moved.
      rate: The learning rate at which it converges, for one that has a rate.
      steps: In how many steps it does.
      kind: Whether it stands for a way to treat state, where one of each is enough.
      exact: Whether its bits are the same however it is compiled.
      slow: Whether it is one more variant, tested by `pytest -m slow`.
    """

    name: str
    factory: Callable[..., optax.GradientTransformation]
    options: Callable[[Any], Mapping[str, Any]] = lambda axis: {}
    own: bool = False
    owes: bool = False
    averages: bool = True
    alone: bool = True
    over_workers: bool = True
    functions: bool = False
    moves: int = 1
    rate: Any = 0.3
    steps: int = 800
    kind: bool = False
    exact: bool = True
    slow: bool = False

    def make(self, axis_name: Any = None, **changes: Any) -> Any:
        """The transformation over an axis, or of a single worker."""
        options = {**self.options(axis_name), **changes}
        if self.over_workers and "axis_name" in self.parameters:
            options["axis_name"] = axis_name
        return self.factory(**options)

    @property
    def parameters(self) -> frozenset[str]:
        """The names of the factory's options."""
        return frozenset(inspect.signature(self.factory).parameters)

    @property
    def static_args(self) -> tuple[str, ...]:
        """What `optax.inject_hyperparams` must not trace: all but the rate."""
        return tuple(self.parameters - {"learning_rate", "weight_decay"})


TOP = efopt.top_k(k=3)
BLOCKED = efopt.scaled_sign(8)
UNBIASED = efopt.random_k(k=2, unbiased=True)


def reference(axis_name: Any) -> Any:
    """Gradients at a reference point: of each worker, or of the only one."""
    rng = np.random.default_rng(17)
    lead = () if axis_name is None else (WORKERS,)
    return {
        k: rng.standard_normal((*lead, *s)).astype(np.float32)
        for k, s in SHAPES.items()
    }


SCHEMES = (
    Scheme("compress", efopt.compress, lambda axis: {"compressor": TOP}),
    Scheme(
        "compress_random",
        efopt.compress,
        lambda axis: {"compressor": efopt.quantize(4)},
        slow=True,
    ),
    Scheme(
        "error_feedback",
        efopt.error_feedback,
        lambda axis: {"compressor": TOP},
        own=True,
        owes=True,
        kind=True,
    ),
    Scheme(
        "error_feedback_two_phase",
        efopt.error_feedback,
        lambda axis: {
            "compressor": BLOCKED,
            "exchange": None if axis is None else "two_phase",
        },
        own=True,
        owes=True,
        kind=True,
    ),
    Scheme(
        "error_feedback_delayed",
        efopt.error_feedback,
        lambda axis: {
            "compressor": BLOCKED,
            "exchange": None if axis is None else "two_phase",
            "delay": 1,
        },
        own=True,
        owes=True,
        slow=True,
    ),
    Scheme(
        "error_feedback_low_rank",
        efopt.error_feedback,
        lambda axis: {"compressor": efopt.power_sgd(1, min_compression=0)},
        own=True,
        owes=True,
        exact=False,
        slow=True,
    ),
    Scheme(
        "contractive_bits",
        efopt.contractive_error_feedback,
        lambda axis: {
            "compressor": efopt.random_block(fraction=0.3),
            "memory": efopt.quantize(8, block_size=4),
        },
        own=True,
        owes=True,
        kind=True,
    ),
    Scheme(
        "contractive_sketch",
        efopt.contractive_error_feedback,
        lambda axis: {
            "compressor": efopt.random_block(fraction=0.3),
            "memory": efopt.compressors.count_sketch(fraction=0.3),
        },
        own=True,
        owes=True,
        exact=False,
        slow=True,
    ),
    Scheme(
        "damped_error_feedback",
        efopt.feedback.damped_error_feedback,
        lambda axis: {"compressor": efopt.quantize(4), "alpha": 0.1, "beta": 0.9},
        own=True,
        owes=True,
        exact=False,
    ),
    Scheme(
        "damped_memory",
        efopt.feedback.damped_error_feedback,
        lambda axis: {
            "compressor": efopt.quantize(4),
            "alpha": 0.1,
            "beta": 0.9,
            "memory": efopt.quantize(8, block_size=4),
        },
        own=True,
        owes=True,
        exact=False,
        slow=True,
    ),
    Scheme(
        "ef21",
        efopt.feedback.ef21,
        lambda axis: {"compressor": TOP, "beta": 0.9, "start": 1},
        own=True,
        exact=False,
    ),
    Scheme(
        "ef21_two_phase",
        efopt.feedback.ef21,
        lambda axis: {
            "compressor": BLOCKED,
            "exchange": None if axis is None else "two_phase",
        },
        own=True,
        exact=False,
        slow=True,
    ),
    Scheme(
        "econtrol",
        efopt.feedback.econtrol,
        lambda axis: {"compressor": TOP, "learning_rate": 0.1},
        own=True,
        owes=True,
        exact=False,
    ),
    Scheme(
        "econtrol_stored",
        efopt.feedback.econtrol,
        lambda axis: {
            "compressor": BLOCKED,
            "gain": 0.5,
            "estimate": False,
            "start": 2,
            "memory": efopt.quantize(8, block_size=4),
        },
        own=True,
        owes=True,
        exact=False,
        slow=True,
    ),
    Scheme(
        "loco",
        efopt.feedback.loco,
        lambda axis: {
            "exchange": "two_phase",
            "reset": 2,
            "memory": efopt.quantize(8, block_size=4),
        },
        own=True,
        owes=True,
        exact=False,
    ),
    Scheme(
        "scale_by_dion",
        efopt.feedback.scale_by_dion,
        lambda axis: {"rank": 2},
        own=True,
        exact=False,
        slow=True,
    ),
    Scheme(
        "scale_by_one_bit_adam",
        efopt.feedback.scale_by_one_bit_adam,
        lambda axis: {"warmup": 2, "compressor": BLOCKED},
        own=True,
        owes=True,
        exact=False,
        slow=True,
    ),
    Scheme("third_party", changes, lambda axis: {"compressor": TOP}, own=True),
    Scheme(
        "diana",
        efopt.convex.diana,
        lambda axis: {"compressor": UNBIASED},
        own=True,
        averages=False,
        exact=False,
    ),
    Scheme(
        "lsvrg",
        efopt.convex.lsvrg,
        lambda axis: {"probability": 0.5},
        own=True,
        averages=False,
        functions=True,
    ),
    Scheme(
        "star",
        efopt.convex.star,
        lambda axis: {"reference_grads": reference(axis)},
        averages=False,
        exact=False,
    ),
    Scheme(
        "per_worker",
        efopt.per_worker,
        lambda axis: {"inner": optax.trace(0.9)},
        own=True,
        averages=False,
        alone=False,
    ),
    Scheme(
        "accumulate",
        efopt.accumulate,
        lambda axis: {
            "inner": efopt.error_feedback(TOP, axis_name=axis),
            "every": 2,
        },
        own=True,
        owes=True,
        alone=False,
    ),
    Scheme(
        "local_steps",
        efopt.local_steps,
        lambda axis: {
            "inner": optax.sgd(0.1, momentum=0.5),
            "outer": optax.chain(
                efopt.error_feedback(TOP, axis_name=axis), optax.sgd(1.0)
            ),
            "every": 2,
        },
        own=True,
        owes=True,
    ),
    Scheme(
        "skip_not_finite",
        efopt.watch.skip_not_finite,
        lambda axis: {"inner": efopt.error_feedback(TOP, axis_name=axis)},
        own=True,
        owes=True,
    ),
    Scheme(
        "observe",
        efopt.watch.observe,
        lambda axis: {
            "inner": efopt.error_feedback(
                BLOCKED,
                axis_name=axis,
                exchange=None if axis is None else "two_phase",
            )
        },
        own=True,
        owes=True,
    ),
)

OPTIMIZERS = (
    Scheme(
        "signsgd",
        efopt.signsgd,
        rate=0.02,
        steps=1600,
    ),
    Scheme("signum", efopt.optimizers.signum, own=True, rate=0.02, steps=1600),
    Scheme(
        "ef_sgd",
        efopt.ef_sgd,
        lambda axis: {"compressor": TOP},
        own=True,
        owes=True,
        kind=True,
    ),
    Scheme(
        "ef_sgd_at_server",
        efopt.ef_sgd,
        lambda axis: {"compressor": TOP, "momentum": 0.5, "momentum_at": "server"},
        own=True,
        owes=True,
        rate=0.1,
        steps=1200,
        slow=True,
    ),
    Scheme(
        "ef_signsgd",
        efopt.ef_signsgd,
        lambda axis: {"momentum": 0.9},
        own=True,
        owes=True,
        rate=0.03,
    ),
    Scheme(
        "dist_ef_sgd",
        efopt.dist_ef_sgd,
        lambda axis: {"compressor": BLOCKED},
        own=True,
        owes=True,
        rate=0.03,
    ),
    Scheme(
        "power_sgd_momentum",
        efopt.power_sgd_momentum,
        lambda axis: {"rank": 1, "min_compression": 0},
        own=True,
        owes=True,
        rate=0.03,
        exact=False,
    ),
    Scheme(
        "demo",
        efopt.optimizers.demo,
        lambda axis: {"k": 6, "tile": 4, "decay": 0.9},
        own=True,
        owes=True,
        rate=0.02,
        steps=1600,
        exact=False,
    ),
    Scheme(
        "dion",
        efopt.optimizers.dion,
        lambda axis: {"rank": 2, "fallback": optax.sgd(0.3)},
        own=True,
        rate=0.05,
        steps=1600,
        exact=False,
    ),
    Scheme(
        "distributed_lion",
        efopt.optimizers.distributed_lion,
        own=True,
        rate=0.02,
        steps=1600,
    ),
    Scheme(
        "lion_cub",
        efopt.optimizers.distributed_lion,
        lambda axis: {
            "compressor": efopt.quantize(4),
            "average_momentum": None if axis is None else 2,
        },
        own=True,
        rate=0.02,
        steps=1600,
        exact=False,
        slow=True,
    ),
    Scheme(
        "one_bit_adam",
        efopt.optimizers.one_bit_adam,
        lambda axis: {"warmup": 2, "eps": 0.1, "compressor": BLOCKED},
        own=True,
        owes=True,
        rate=0.1,
        steps=1600,
        exact=False,
    ),
    Scheme(
        "zero_one_adam",
        efopt.optimizers.zero_one_adam,
        lambda axis: {
            "freeze": 100,
            "refresh": 1,
            "eps": 0.1,
            "compressor": BLOCKED,
        },
        own=True,
        owes=True,
        rate=0.1,
        steps=1600,
        exact=False,
        slow=True,
    ),
    Scheme(
        "zero_one_adam_local",
        efopt.optimizers.zero_one_adam,
        lambda axis: {
            "freeze": 100,
            "refresh": 1,
            "longest": 4,
            "doubling": 200,
            "eps": 0.1,
            "compressor": BLOCKED,
        },
        own=True,
        owes=True,
        rate=0.1,
        steps=1600,
        exact=False,
        slow=True,
    ),
    Scheme(
        "ecq_sgd",
        efopt.optimizers.ecq_sgd,
        own=True,
        owes=True,
        rate=0.3,
        exact=False,
    ),
    Scheme(
        "ec_sgd",
        efopt.convex.ec_sgd,
        lambda axis: {"compressor": TOP},
        own=True,
        owes=True,
    ),
    Scheme(
        "ec_gd_star",
        efopt.convex.ec_gd_star,
        lambda axis: {
            "compressor": TOP,
            "reference_grads": jax.tree.map(np.zeros_like, reference(axis)),
        },
        own=True,
        owes=True,
        exact=False,
    ),
    Scheme(
        "ec_sgd_diana",
        efopt.convex.ec_sgd_diana,
        lambda axis: {"compressor": TOP, "shift_compressor": UNBIASED},
        own=True,
        owes=True,
        exact=False,
    ),
    Scheme(
        "ec_lsvrg",
        efopt.convex.ec_lsvrg,
        lambda axis: {"compressor": TOP, "probability": 0.2},
        own=True,
        owes=True,
        functions=True,
    ),
    Scheme(
        "ec_lsvrg_diana",
        efopt.convex.ec_lsvrg_diana,
        lambda axis: {
            "compressor": TOP,
            "probability": 0.2,
            "shift_compressor": UNBIASED,
        },
        own=True,
        owes=True,
        functions=True,
        exact=False,
    ),
    Scheme(
        "ec_lsvrg_shifted",
        efopt.convex.ec_lsvrg_shifted,
        lambda axis: {"compressor": TOP, "probability": 0.2},
        own=True,
        owes=True,
        functions=True,
        exact=False,
    ),
    Scheme(
        "eclk",
        efopt.convex.eclk,
        lambda axis: {"compressor": TOP, "smoothness": 3.0, "strong_convexity": 0.1},
        own=True,
        owes=True,
        functions=True,
        rate=None,
        steps=1500,
        exact=False,
    ),
    Scheme(
        "diloco",
        efopt.outer.diloco,
        lambda axis: {
            "inner": optax.sgd(0.2),
            "every": 2,
            "compressor": BLOCKED,
            "momentum": 0.5,
        },
        own=True,
        owes=True,
        moves=2,
        rate=None,
    ),
    Scheme(
        "diloco_streamed",
        efopt.outer.diloco,
        lambda axis: {
            "inner": optax.sgd(0.2),
            "every": 3,
            "fragments": 2,
            "delay": 1,
            "alpha": 0.5,
            "momentum": 0.5,
        },
        own=True,
        moves=2,
        rate=None,
        slow=True,
    ),
    Scheme(
        "local_sgd",
        efopt.outer.local_sgd,
        lambda axis: {"inner": optax.sgd(0.2), "every": 2, "start": 1},
        own=True,
        rate=None,
        slow=True,
    ),
    Scheme(
        "sparse_loco",
        efopt.outer.sparse_loco,
        lambda axis: {"inner": optax.sgd(0.2), "every": 2, "compressor": TOP},
        own=True,
        owes=True,
        moves=2,
        rate=None,
        slow=True,
    ),
    Scheme(
        "muloco",
        efopt.outer.muloco,
        lambda axis: {
            "inner_learning_rate": optax.cosine_decay_schedule(0.2, 800),
            "every": 2,
            "momentum": 0.0,
            "compressor": efopt.quantize(8),
        },
        own=True,
        owes=True,
        moves=2,
        rate=None,
        exact=False,
        slow=True,
    ),
    Scheme(
        "loopless_katyusha",
        efopt.convex.loopless_katyusha,
        lambda axis: {
            "smoothness": 1.0,
            "strong_convexity": 0.1,
            "probability": 0.5,
        },
        over_workers=False,
        owes=True,
        functions=True,
        rate=None,
        exact=False,
    ),
)
