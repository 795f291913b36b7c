"""Feedback schemes: what a worker owes, and when it is paid. One scheme a file."""

from efopt.feedback.compress import CompressState as CompressState
from efopt.feedback.compress import compress as compress
from efopt.feedback.contractive import (
    contractive_error_feedback as contractive_error_feedback,
)
from efopt.feedback.damped import DampedErrorFeedbackState as DampedErrorFeedbackState
from efopt.feedback.damped import damped_error_feedback as damped_error_feedback
from efopt.feedback.dion import ScaleByDionState as ScaleByDionState
from efopt.feedback.dion import scale_by_dion as scale_by_dion
from efopt.feedback.econtrol import (
    ContractiveEControlState as ContractiveEControlState,
)
from efopt.feedback.econtrol import EControlState as EControlState
from efopt.feedback.econtrol import econtrol as econtrol
from efopt.feedback.ef21 import EF21State as EF21State
from efopt.feedback.ef21 import ef21 as ef21
from efopt.feedback.error_feedback import (
    ContractiveErrorFeedbackState as ContractiveErrorFeedbackState,
)
from efopt.feedback.error_feedback import ErrorFeedbackState as ErrorFeedbackState
from efopt.feedback.error_feedback import error_feedback as error_feedback
from efopt.feedback.frozen import frozen as frozen
from efopt.feedback.frozen_variance import FrozenVarianceState as FrozenVarianceState
from efopt.feedback.frozen_variance import (
    scale_by_one_bit_adam as scale_by_one_bit_adam,
)
from efopt.feedback.loco import LoCoState as LoCoState
from efopt.feedback.loco import loco as loco
from efopt.feedback.virtual import virtual_params as virtual_params
