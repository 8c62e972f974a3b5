"""What tests and benchmarks share: a tiny network, commands in forked processes, and whether two runs are equal."""
