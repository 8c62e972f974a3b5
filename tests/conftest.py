"""One thread and repeatable draws: a red test is due to a change, never to luck."""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("llmx", max_examples=15, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("llmx")
