"""Some hundred faults on purpose: each is injected into a run, followed by what a user would do next."""
