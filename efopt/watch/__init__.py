"""What is watched: a guard against what is not finite."""

from efopt.watch.skip_not_finite import SkipNotFiniteState as SkipNotFiniteState
from efopt.watch.skip_not_finite import require_finite as require_finite
from efopt.watch.skip_not_finite import skip_not_finite as skip_not_finite
