"""Gradient compression and error feedback for JAX, as Optax transformations.

What most programs need stands here; everything else on a shelf: all compressors in
:mod:`efopt.compressors`, the ways of meeting in :mod:`efopt.exchanges`, all schemes and
their states in :mod:`efopt.feedback`, published optimizers in :mod:`efopt.optimizers`,
those for convex problems in :mod:`efopt.convex`, meeting rarely in :mod:`efopt.outer`,
what travels in :mod:`efopt.wire`, what it costs in memory in :mod:`efopt.memory`,
what watches over a run in :mod:`efopt.watch`, and a state for other workers in
:mod:`efopt.checkpoints`.
"""

from importlib import metadata as _metadata
from typing import NoReturn as _NoReturn

from efopt import checkpoints as checkpoints
from efopt import compressors as compressors
from efopt import convex as convex
from efopt import exchanges as exchanges
from efopt import feedback as feedback
from efopt import memory as memory
from efopt import optimizers as optimizers
from efopt import outer as outer
from efopt import watch as watch
from efopt import wire as wire
from efopt.compressors import Compressor as Compressor
from efopt.compressors import compose as compose
from efopt.compressors import power_sgd as power_sgd
from efopt.compressors import quantize as quantize
from efopt.compressors import random_block as random_block
from efopt.compressors import random_k as random_k
from efopt.compressors import scaled_sign as scaled_sign
from efopt.compressors import sign as sign
from efopt.compressors import top_k as top_k
from efopt.feedback import compress as compress
from efopt.feedback import contractive_error_feedback as contractive_error_feedback
from efopt.feedback import error_feedback as error_feedback
from efopt.feedback import virtual_params as virtual_params
from efopt.memory import memory_report as memory_report
from efopt.optimizers import dist_ef_sgd as dist_ef_sgd
from efopt.optimizers import ef_sgd as ef_sgd
from efopt.optimizers import ef_signsgd as ef_signsgd
from efopt.optimizers import power_sgd_momentum as power_sgd_momentum
from efopt.optimizers import signsgd as signsgd
from efopt.outer import local_steps as local_steps
from efopt.workers import PerWorker as PerWorker
from efopt.workers import accumulate as accumulate
from efopt.workers import distribute as distribute
from efopt.workers import local_params as local_params
from efopt.workers import partition_specs as partition_specs
from efopt.workers import per_worker as per_worker
from efopt.workers import stack_workers as stack_workers
from efopt.workers import value_and_grad as value_and_grad

try:
    __version__ = _metadata.version("efopt")
except _metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"
__all__ = [
    "Compressor",
    "PerWorker",
    "accumulate",
    "checkpoints",
    "compose",
    "compress",
    "compressors",
    "contractive_error_feedback",
    "convex",
    "dist_ef_sgd",
    "distribute",
    "ef_sgd",
    "ef_signsgd",
    "error_feedback",
    "exchanges",
    "feedback",
    "local_params",
    "local_steps",
    "memory",
    "memory_report",
    "optimizers",
    "outer",
    "partition_specs",
    "per_worker",
    "power_sgd",
    "power_sgd_momentum",
    "quantize",
    "random_block",
    "random_k",
    "scaled_sign",
    "sign",
    "signsgd",
    "stack_workers",
    "top_k",
    "value_and_grad",
    "virtual_params",
    "watch",
    "wire",
]


def __getattr__(name: str) -> _NoReturn:
    """Says on which shelf a name stands that is not here."""
    shelves = (checkpoints, compressors, convex, exchanges, feedback, memory)
    shelves += (optimizers, outer, watch, wire)
    found = [shelf.__name__ for shelf in shelves if hasattr(shelf, name)]
    where = f"; it is `{found[0]}.{name}`" if found and name[0] != "_" else ""
    raise AttributeError(f"module 'efopt' has no attribute {name!r}{where}")
