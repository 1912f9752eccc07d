"""Import it first: OpenMP reads how long its threads wait once, when torch loads it. The command line does the same."""

from lightning_fot.system.openmp import wait_briefly

wait_briefly()
