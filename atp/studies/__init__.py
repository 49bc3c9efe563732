"""Studies of several runs: comparisons, sweeps and experiments, and the engines that start their members."""
