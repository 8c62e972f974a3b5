"""The verb `sweep`: many runs of `fit` over a search space, shared by any number of processes, resumable."""
