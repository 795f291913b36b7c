"""Which state differs from worker to worker, and where it lives."""

from efopt.workers.accumulate import AccumulateState as AccumulateState
from efopt.workers.accumulate import accumulate as accumulate
from efopt.workers.local import local_params as local_params
from efopt.workers.node import PerWorker as PerWorker
from efopt.workers.per_worker import per_worker as per_worker
from efopt.workers.placement import distribute as distribute
from efopt.workers.placement import partition_specs as partition_specs
from efopt.workers.placement import stack_workers as stack_workers
from efopt.workers.value_and_grad import value_and_grad as value_and_grad
