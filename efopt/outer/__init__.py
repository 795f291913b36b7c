"""Meeting rarely: local steps, and meetings of compressed pseudo-gradients."""

from efopt.outer.local_steps import LocalStepsState as LocalStepsState
from efopt.outer.local_steps import local_steps as local_steps
