"""Published optimizers, each a chain of the library's parts. One a file."""

from efopt.optimizers.demo import demo as demo
from efopt.optimizers.dion import dion as dion
from efopt.optimizers.dist_ef_sgd import dist_ef_sgd as dist_ef_sgd
from efopt.optimizers.distributed_lion import distributed_lion as distributed_lion
from efopt.optimizers.ecq_sgd import ecq_sgd as ecq_sgd
from efopt.optimizers.ef_sgd import ef_sgd as ef_sgd
from efopt.optimizers.ef_signsgd import ef_signsgd as ef_signsgd
from efopt.optimizers.one_bit_adam import one_bit_adam as one_bit_adam
from efopt.optimizers.power_sgd_momentum import power_sgd_momentum as power_sgd_momentum
from efopt.optimizers.signsgd import signsgd as signsgd
from efopt.optimizers.signum import signum as signum
from efopt.optimizers.zero_one_adam import zero_one_adam as zero_one_adam
