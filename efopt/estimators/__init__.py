"""Gradient estimators, to stand in front of error feedback in a chain. One a file."""

from efopt.estimators.diana import DianaState as DianaState
from efopt.estimators.diana import diana as diana
from efopt.estimators.lsvrg import LsvrgState as LsvrgState
from efopt.estimators.lsvrg import lsvrg as lsvrg
from efopt.estimators.star import star as star
