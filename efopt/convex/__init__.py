"""Convex problems to the last digit: gradient estimators, the EC-SGD family, ECLK."""

from efopt.convex.diana import DianaState as DianaState
from efopt.convex.diana import diana as diana
from efopt.convex.ec_lsvrg_shifted import EcLsvrgShiftedState as EcLsvrgShiftedState
from efopt.convex.ec_lsvrg_shifted import ec_lsvrg_shifted as ec_lsvrg_shifted
from efopt.convex.ec_sgd import ec_gd_star as ec_gd_star
from efopt.convex.ec_sgd import ec_lsvrg as ec_lsvrg
from efopt.convex.ec_sgd import ec_lsvrg_diana as ec_lsvrg_diana
from efopt.convex.ec_sgd import ec_sgd as ec_sgd
from efopt.convex.ec_sgd import ec_sgd_diana as ec_sgd_diana
from efopt.convex.eclk import EclkState as EclkState
from efopt.convex.eclk import eclk as eclk
from efopt.convex.eclk import loopless_katyusha as loopless_katyusha
from efopt.convex.lsvrg import LsvrgState as LsvrgState
from efopt.convex.lsvrg import lsvrg as lsvrg
from efopt.convex.star import star as star
