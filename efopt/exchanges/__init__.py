"""Exchanges: how the workers' payloads become one average. One way a file.

Pass one as ``exchange=`` of any scheme, or its name. A third party's is a subclass of
:class:`Exchange`; :func:`open_link` is what a third party's scheme talks through.
"""

from efopt.exchanges.all_gather import all_gather as all_gather
from efopt.exchanges.all_reduce import all_reduce as all_reduce
from efopt.exchanges.exchange import Exchange as Exchange
from efopt.exchanges.hierarchical import hierarchical as hierarchical
from efopt.exchanges.home import LinkState as LinkState
from efopt.exchanges.link import Averaged as Averaged
from efopt.exchanges.link import Link as Link
from efopt.exchanges.majority_vote import majority_vote as majority_vote
from efopt.exchanges.opening import open_link as open_link
from efopt.exchanges.two_phase import two_phase as two_phase
