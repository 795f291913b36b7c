"""A state of last week for the workers of today: records, targets, other numbers."""

from efopt.checkpoints.record import check as check
from efopt.checkpoints.record import record as record
from efopt.checkpoints.resize import resize as resize
from efopt.checkpoints.target import target as target
