"""The verb `sweep`: many runs of `fit` over a search space; any number of processes share it, and it can resume."""
