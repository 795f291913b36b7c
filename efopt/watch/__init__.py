"""What guards a long run, and what one can see of it."""

from efopt.exchanges.watched import Watched as Watched
from efopt.watch.agreement import require_agreement as require_agreement
from efopt.watch.agreement import workers_agree as workers_agree
from efopt.watch.observe import WatchReport as WatchReport
from efopt.watch.observe import WatchRow as WatchRow
from efopt.watch.observe import observe as observe
from efopt.watch.observe import report as report
from efopt.watch.skip_not_finite import SkipNotFiniteState as SkipNotFiniteState
from efopt.watch.skip_not_finite import require_finite as require_finite
from efopt.watch.skip_not_finite import skip_not_finite as skip_not_finite
