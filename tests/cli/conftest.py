"""The laboratory of the command line's tests: two layers, and a validation in the middle of a run."""

import pytest

from testbed.tiny import network


@pytest.fixture
def laboratory(laboratory):
    trainer = {"max_steps": 6, "val_check_interval": 4, "log_every_n_steps": 2, "gradient_clip_val": 1.0}
    laboratory.configure(trainer=trainer, model={"network": network(depth=2), "sampling": {"max_new_tokens": 12}})
    return laboratory
