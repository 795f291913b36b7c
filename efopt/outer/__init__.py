"""Meeting rarely: local steps, and meetings of compressed pseudo-gradients."""

from efopt.outer.diloco import diloco as diloco
from efopt.outer.local_sgd import local_sgd as local_sgd
from efopt.outer.local_steps import LocalStepsState as LocalStepsState
from efopt.outer.local_steps import local_steps as local_steps
from efopt.outer.muloco import muloco as muloco
from efopt.outer.reduce_mean import init_mean as init_mean
from efopt.outer.reduce_mean import reduce_mean as reduce_mean
from efopt.outer.sparse_loco import sparse_loco as sparse_loco
