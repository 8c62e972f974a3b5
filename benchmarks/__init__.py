"""Speed against other libraries: `python -m benchmarks.train`, `.generate`, `.mixers`, `.scaling`, `.startup`.

Also `robustness/` (injected faults, bad input, two nodes) and `league/` (all architectures under one protocol).
"""
