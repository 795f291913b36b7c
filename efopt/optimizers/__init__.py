"""Published optimizers, each a chain of the library's parts. One a file."""

from efopt.optimizers.dist_ef_sgd import dist_ef_sgd as dist_ef_sgd
from efopt.optimizers.ec_lsvrg import ec_lsvrg as ec_lsvrg
from efopt.optimizers.ec_lsvrg import ec_lsvrg_diana as ec_lsvrg_diana
from efopt.optimizers.ec_lsvrg_shifted import EcLsvrgShiftedState as EcLsvrgShiftedState
from efopt.optimizers.ec_lsvrg_shifted import ec_lsvrg_shifted as ec_lsvrg_shifted
from efopt.optimizers.ec_sgd import ec_gd_star as ec_gd_star
from efopt.optimizers.ec_sgd import ec_sgd as ec_sgd
from efopt.optimizers.ec_sgd_diana import ec_sgd_diana as ec_sgd_diana
from efopt.optimizers.eclk import EclkState as EclkState
from efopt.optimizers.eclk import eclk as eclk
from efopt.optimizers.eclk import loopless_katyusha as loopless_katyusha
from efopt.optimizers.ecq_sgd import ecq_sgd as ecq_sgd
from efopt.optimizers.ef_sgd import ef_sgd as ef_sgd
from efopt.optimizers.ef_signsgd import ef_signsgd as ef_signsgd
from efopt.optimizers.power_sgd_momentum import power_sgd_momentum as power_sgd_momentum
from efopt.optimizers.signsgd import signsgd as signsgd
from efopt.optimizers.signum import signum as signum
from efopt.optimizers.virtual import virtual_params as virtual_params
