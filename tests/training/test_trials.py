"""What a fit tries before its first step, and what it leaves as it is: forms, gradients, the network that trains."""

from pathlib import Path

import pytest

from tests.laboratory import curves_of, metrics_of, weights_of

MIXERS = """
import time
import torch
from torch import nn
from typing import NamedTuple
from llmx.protocol import Mixer, StatefulMixer

class Mean(NamedTuple):
    total: torch.Tensor
    count: torch.Tensor

class Honest(StatefulMixer[Mean]):
    def __init__(self, site):
        super().__init__()
        self.linear = nn.Linear(site.dim, site.dim)

    def forward(self, x, context):
        return self.linear(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]

    def init_state(self, batch_size, max_length):
        zeros = self.linear.weight.new_zeros
        return Mean(zeros(batch_size, self.linear.out_features), zeros(batch_size, 1))

    def step(self, x, state, context):
        state = Mean(state.total + self.linear(x), state.count + 1)
        return state.total / state.count, state

class Forgetful(Honest):
    def step(self, x, state, context):
        output, _ = super().step(x, state, context)
        return output, state

class OffByOne(Honest):
    def step(self, x, state, context):
        output, after = super().step(x, state, context)
        return output * after.count / (after.count + 1), after

class Misshapen(Honest):
    def step(self, x, state, context):
        output, state = super().step(x, state, context)
        return output[:, :-1], state

class Failing(Honest):
    def step(self, x, state, context):
        return x.unpack(), state

class Lonely(Honest):
    def step(self, x, state, context):
        return super().step(x, state, context)[0]

class Narrow(Honest):
    def step(self, x, state, context):
        output, state = super().step(x, state, context)
        return output[:, :1], state  # which broadcasts

class Abrupt(Honest):
    def prefill(self, x, state, context):
        raise NotImplementedError("no prefill yet")

class Careless(Honest):
    def prefill(self, x, state, context):
        return self.forward(x, context), state

class InSingle(Honest):
    def step(self, x, state, context):
        output, state = super().step(x, state, context)
        return output.float().to(x.dtype), state

class SingleState(Honest):
    def init_state(self, batch_size, max_length):
        return Mean(torch.zeros(batch_size, self.linear.out_features), torch.zeros(batch_size, 1))

    def step(self, x, state, context):
        state = Mean(state.total + self.linear(x), state.count + 1)
        return torch.matmul(state.total, torch.eye(x.shape[1])) / state.count, state  # for float32 alone

class Unused(Honest):
    def __init__(self, site):
        super().__init__(site)
        self.unused = nn.Parameter(torch.zeros(3, 4))

class Counting(Mixer):
    def __init__(self, site):
        super().__init__()
        self.linear = nn.Linear(site.dim, site.dim)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x, context):
        if self.training:
            self.passes += 1
            if not self.largest:
                self.largest.copy_(x.detach().abs().max())  # initialised by the first batch
        return self.linear(x) / (self.largest if self.largest else 1)

class Unwritable(Honest):
    def step(self, x, state, context):
        if x.dtype == torch.float32:
            raise ValueError(f"not in single precision, object {time.monotonic_ns()}")
        return super().step(x, state, context)
"""


@pytest.fixture
def laboratory(laboratory):
    Path("forms.py").write_text(MIXERS)
    return laboratory


def using(laboratory, name):
    laboratory.config["model"]["network"]["init_args"]["block"]["init_args"]["mixer"] = f"forms.{name}"
    laboratory.configure()
    return laboratory


def line_of(text):
    """Of the method that follows a class statement."""
    lines = MIXERS.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"class {text}("))
    return next(number for number, line in enumerate(lines) if number > start and "def " in line) + 1


@pytest.mark.parametrize(
    ("name", "said", "line"),
    [
        ("Forgetful", "outputs differ by", 0),
        ("OffByOne", "outputs differ by", 0),
        ("Misshapen", "gives (3, 7), not (3, 8)", 0),
        ("Narrow", "gives (3, 1), not (3, 8)", 0),
        ("Lonely", "fails: ", 0),
        ("Failing", "in step: AttributeError: 'Tensor' object has no attribute 'unpack'", 1),
        ("Abrupt", "in prefill: no prefill yet", 1),
        ("Careless", "in pieces of", 0),
    ],
)
def test_a_recurrent_form_that_is_wrong_is_told_with_its_component_file_and_line(laboratory, capsys, name, said, line):
    message = using(laboratory, name).refusal(capsys, "fit", "--config", "tiny.yaml")
    assert said in message
    assert f"blocks.0.mixer ({name})" in message
    assert f"forms.py, line {line_of(name) + line}" in message
    assert "--model.audit warn" in message


def test_under_warn_a_wrong_form_is_one_line_and_the_run_goes_on(laboratory):
    with pytest.warns(UserWarning, match=r"blocks.0.mixer \(Forgetful\)"):
        run = using(laboratory, "Forgetful").fit("--model.audit", "warn")
    assert metrics_of(run)["step"] == 2
    assert not metrics_of(run)["leaking"]


@pytest.mark.parametrize("name", ["Honest", "InSingle", "SingleState"])
def test_forms_that_agree_within_their_precision_pass(laboratory, name):
    using(laboratory, name).fit()


def test_a_parameter_without_a_gradient_is_one_line(laboratory, capsys):
    using(laboratory, "Unused").fit()
    silent = [line for line in capsys.readouterr().out.splitlines() if "no gradient reaches" in line]
    assert silent == ["model.network: no gradient reaches blocks.0.mixer.unused (12 parameters)"]


def test_the_network_that_trains_runs_on_its_batches_and_on_nothing_else(laboratory):
    weights = weights_of(using(laboratory, "Counting").fit("--trainer.max_steps", 3))
    assert weights["network.blocks.0.mixer.passes"] == 3
    assert weights["network.blocks.0.mixer.largest"] > 0


def test_a_sample_that_fails_costs_one_line_and_no_run(laboratory, capsys):
    laboratory.configure(trainer={"val_check_interval": 1})
    using(laboratory, "Unwritable")
    run = laboratory.fit("--trainer.max_steps", 3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no sample at step ")]
    assert len(lines) == 1
    assert f"forms.py, line {line_of('Unwritable') + 2}, in step: ValueError: not in single precision" in lines[0]
    assert metrics_of(run)["step"] == 3
    assert metrics_of(run)["generated_tokens_per_second"] is None
    assert len(curves_of(run)["val/loss"]) == 3
