"""Whatever a fit tries before its first step, the network that trains first reads the first training batch."""

from pathlib import Path

import pytest
import torch

from tests.laboratory import weights_of

COUNTING = """
import torch
from lightning.pytorch.callbacks import Callback
from llmx.feedforward.swiglu import SwiGLU

class Counting(SwiGLU):
    calls = 0

    def forward(self, x, context):
        self.calls += 1
        return super().forward(x, context)

class Calls(Callback):
    \"\"\"Writes down how often the component ran before and after the first training step.\"\"\"

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 0:
            self.before = module.network.blocks[0].feed_forward.calls

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 1:
            open("calls", "w").write(f"{self.before} {module.network.blocks[0].feed_forward.calls}")
"""
INITIALISING = """
import torch
from torch import nn
from lightning.pytorch.callbacks import Callback
from llmx.feedforward.swiglu import SwiGLU

class Initialising(SwiGLU):
    \"\"\"Takes its scale from the first tokens that it reads, and uses it from the second step on.\"\"\"

    def __init__(self, site, hidden=8):
        super().__init__(site, hidden)
        self.first = nn.Parameter(torch.tensor(-1.0), requires_grad=False)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x, context):
        if self.first < 0:
            self.first.copy_(context.tokens.sum())
        return super().forward(x, context) * self.scale

    def after_optimizer_step(self):
        self.scale.copy_(1 + self.first % 7)

class Seen(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 0:
            open("seen", "w").write(str(batch.inputs.sum().item()))
"""


def with_feed_forward(laboratory, name, source, **init_args):
    """Writes a component into own.py and puts it into the config."""
    Path("own.py").write_text(source)
    block = laboratory.config["model"]["network"]["init_args"]["block"]["init_args"]
    block["feed_forward"] = {"class_path": f"own.{name}", "init_args": init_args}
    laboratory.configure()


@pytest.mark.parametrize("audit", ["error", "off"])
def test_the_network_that_trains_first_runs_on_the_first_batch(laboratory, audit):
    with_feed_forward(laboratory, "Counting", COUNTING)
    laboratory.fit("--trainer.callbacks+=own.Calls", "--model.audit", audit)
    assert Path("calls").read_text() == "0 1"


@pytest.mark.parametrize("audit", ["error", "off"])
def test_an_initialisation_by_data_reads_the_first_training_batch(laboratory, audit):
    with_feed_forward(laboratory, "Initialising", INITIALISING)
    run = laboratory.fit("--trainer.callbacks+=own.Seen", "--model.audit", audit)
    first = weights_of(run)["network.blocks.0.feed_forward.first"]
    assert torch.equal(first, torch.tensor(float(Path("seen").read_text())))
