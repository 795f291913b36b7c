"""Gradient compression and error feedback for JAX, as Optax transformations."""

from importlib import metadata as _metadata

from efopt import wire as wire
from efopt.compressors import Compressor as Compressor
from efopt.compressors import RoundTripState as RoundTripState
from efopt.compressors import cast as cast
from efopt.compressors import compose as compose
from efopt.compressors import count_sketch as count_sketch
from efopt.compressors import identity as identity
from efopt.compressors import natural as natural
from efopt.compressors import partition as partition
from efopt.compressors import power_sgd as power_sgd
from efopt.compressors import qsgd as qsgd
from efopt.compressors import quantize as quantize
from efopt.compressors import random_block as random_block
from efopt.compressors import random_k as random_k
from efopt.compressors import scaled_sign as scaled_sign
from efopt.compressors import sign as sign
from efopt.compressors import terngrad as terngrad
from efopt.compressors import threshold as threshold
from efopt.compressors import top_k as top_k
from efopt.convex import DianaState as DianaState
from efopt.convex import EclkState as EclkState
from efopt.convex import EcLsvrgShiftedState as EcLsvrgShiftedState
from efopt.convex import LsvrgState as LsvrgState
from efopt.convex import (
    diana,
    ec_lsvrg,
    ec_lsvrg_shifted,
    ec_sgd,
    ec_sgd_diana,
    eclk,
    lsvrg,
    star,
)
from efopt.convex import ec_gd_star as ec_gd_star
from efopt.convex import ec_lsvrg_diana as ec_lsvrg_diana
from efopt.convex import loopless_katyusha as loopless_katyusha
from efopt.feedback import CompressState as CompressState
from efopt.feedback import (
    ContractiveErrorFeedbackState as ContractiveErrorFeedbackState,
)
from efopt.feedback import DampedErrorFeedbackState as DampedErrorFeedbackState
from efopt.feedback import ErrorFeedbackState as ErrorFeedbackState
from efopt.feedback import compress as compress
from efopt.feedback import contractive_error_feedback as contractive_error_feedback
from efopt.feedback import damped_error_feedback as damped_error_feedback
from efopt.feedback import error_feedback as error_feedback
from efopt.feedback import virtual_params as virtual_params
from efopt.memory import MemoryPart as MemoryPart
from efopt.memory import MemoryReport as MemoryReport
from efopt.memory import memory_report as memory_report
from efopt.optimizers import dist_ef_sgd as dist_ef_sgd
from efopt.optimizers import ecq_sgd as ecq_sgd
from efopt.optimizers import ef_sgd as ef_sgd
from efopt.optimizers import ef_signsgd as ef_signsgd
from efopt.optimizers import power_sgd_momentum as power_sgd_momentum
from efopt.optimizers import signsgd as signsgd
from efopt.optimizers import signum as signum
from efopt.workers import AccumulateState as AccumulateState
from efopt.workers import PerWorker as PerWorker
from efopt.workers import accumulate as accumulate
from efopt.workers import distribute as distribute
from efopt.workers import local_params as local_params
from efopt.workers import partition_specs as partition_specs
from efopt.workers import per_worker as per_worker
from efopt.workers import stack_workers as stack_workers

try:
    __version__ = _metadata.version("efopt")
except _metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"
__all__ = [
    "AccumulateState",
    "CompressState",
    "Compressor",
    "RoundTripState",
    "ContractiveErrorFeedbackState",
    "DampedErrorFeedbackState",
    "DianaState",
    "EcLsvrgShiftedState",
    "EclkState",
    "ErrorFeedbackState",
    "LsvrgState",
    "MemoryPart",
    "MemoryReport",
    "PerWorker",
    "accumulate",
    "cast",
    "compose",
    "compress",
    "contractive_error_feedback",
    "count_sketch",
    "damped_error_feedback",
    "diana",
    "dist_ef_sgd",
    "distribute",
    "ec_gd_star",
    "ec_lsvrg",
    "ec_lsvrg_diana",
    "ec_lsvrg_shifted",
    "ec_sgd",
    "ec_sgd_diana",
    "eclk",
    "ecq_sgd",
    "ef_sgd",
    "ef_signsgd",
    "error_feedback",
    "identity",
    "local_params",
    "loopless_katyusha",
    "lsvrg",
    "memory_report",
    "natural",
    "partition",
    "partition_specs",
    "per_worker",
    "power_sgd",
    "power_sgd_momentum",
    "qsgd",
    "quantize",
    "random_block",
    "random_k",
    "scaled_sign",
    "sign",
    "signsgd",
    "signum",
    "stack_workers",
    "star",
    "terngrad",
    "threshold",
    "top_k",
    "virtual_params",
    "wire",
]
