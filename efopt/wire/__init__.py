"""What travels between workers: planned, measured and checked.

:func:`plan` says before training what a configuration will send and whether it will
pay; :func:`measure` reads what a compiled step really sends; :func:`check` raises if
that is more than was promised. ``python -m efopt.wire plan`` plans from a shell.

Two sizes, in bytes, are kept apart: a worker gives ``b`` *operand bytes* to a
collective of ``n`` workers, and then this many *link bytes* leave it, rounded up (none
if ``n = 1``), in this many messages one after the other:

* all-reduce, ring: ``2 (n-1)/n b`` in ``2 (n-1)``;
* reduce-scatter, ring: ``(n-1)/n b`` in ``n-1``;
* all-gather, ring: ``(n-1) b`` in ``n-1``;
* all-to-all, pairwise, and ragged-all-to-all, taken as equal shares: ``(n-1)/n b`` in
  ``n-1``;
* collective-permute, one message: ``b`` in 1;
* collective-broadcast, a chain: ``b`` in ``n-1``.

On a mesh the devices of one slow position are many, and all of the above is told of
each device. Every collective says which axes it crosses, ``report.over("dcn")`` has
those that cross one, and ``report.bytes_over("dcn")`` sums them. Between the slices of
a TPU a collective is a send and a recv by way of the hosts, and is read as what it is.

Not counted is what passes between a device and its own host. Not seen is what a custom
kernel moves without saying so; whatever else moves data between devices is read, or
raises.
"""

from efopt.hlo.check import check as check
from efopt.hlo.measure import measure as measure
from efopt.hlo.networks import Network as Network
from efopt.hlo.read import read_hlo as read_hlo
from efopt.hlo.report import AxisBytes as AxisBytes
from efopt.hlo.report import Collective as Collective
from efopt.hlo.report import WireReport as WireReport
from efopt.hlo.tpu import tpu_compiler_options as tpu_compiler_options
from efopt.wire.plan import plan as plan
from efopt.wire.plan_report import LeafPlan as LeafPlan
from efopt.wire.plan_report import Plan as Plan
from efopt.wire.rounds import Rounds as Rounds
