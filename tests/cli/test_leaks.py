"""The audit for leaks: what a leaking network does to `fit`, `audit` and `validate`."""

from pathlib import Path

import pytest

from llmx.cli import main
from tests.laboratory import metrics_of, newest_run, record_of

LEAKY = """
import torch
from llmx.protocol import Mixer

class Leaky(Mixer):
    def __init__(self, site):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(site.dim))

    def forward(self, x, context):
        return x.mean(1, keepdim=True) * self.weight + x
"""


OPENING = """
import torch
from llmx.protocol import Mixer

class Opening(Mixer):
    def __init__(self, site):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(site.dim))
        self.register_buffer("steps", torch.zeros(()))

    def after_optimizer_step(self):
        self.steps += 1

    def forward(self, x, context):
        return x * self.weight + x.mean(1, keepdim=True) * (self.steps > 2)
"""


def with_mixer(laboratory, name, source):
    """Writes the source of a mixer and puts it into the config."""
    module, _, _ = name.partition(".")
    Path(f"{module}.py").write_text(source)
    laboratory.config["model"]["network"]["init_args"]["block"]["init_args"]["mixer"] = {"class_path": name}
    laboratory.configure()
    return laboratory


@pytest.fixture
def leaky(laboratory):
    return with_mixer(laboratory, "leaky_mixer.Leaky", LEAKY)


@pytest.fixture
def opening(laboratory):
    return with_mixer(laboratory, "opening_mixer.Opening", OPENING)


def test_a_leak_stops_the_run_and_names_its_module(leaky, capsys):
    message = leaky.refusal(capsys, "fit", "--config", "tiny.yaml")
    assert "blocks.0.mixer (Leaky)" in message
    assert "--model.audit warn" in message


def test_a_leak_that_is_let_through_marks_the_run(leaky, capsys):
    folder = leaky.fit("--model.audit", "warn")
    assert "LEAKING" in capsys.readouterr().out.strip().splitlines()[-1]
    assert record_of(folder)["leaking"] is True
    assert metrics_of(folder)["leaking"] is True
    leaky.run("validate", "--ckpt_path", folder / "checkpoints/last.ckpt")
    assert "LEAKING" in capsys.readouterr().out.strip().splitlines()[-1]


def test_the_audit_verb_exits_with_1_for_a_leak(leaky, capsys):
    assert main(["audit", "--config", "tiny.yaml", "--model.audit", "warn"]) == 1
    assert "blocks.0.mixer (Leaky)" in " ".join(capsys.readouterr().out.split())


def test_the_audit_verb_passes_an_honest_network(laboratory, capsys):
    laboratory.run("audit", "--config", "tiny.yaml")
    assert "no leak" in " ".join(capsys.readouterr().out.split())
    assert not Path("lightning_logs").exists()


def test_audit_of_a_leaking_checkpoint_measures_it_with_the_future_hidden(leaky, capsys):
    folder = leaky.fit("--model.audit", "warn")
    capsys.readouterr()
    assert main(["audit", "--ckpt_path", str(folder / "checkpoints/last.ckpt")]) == 1
    assert "with the future hidden" in " ".join(capsys.readouterr().out.split())


def test_a_leak_that_training_opens_stops_the_run_at_its_validation(opening, capsys):
    assert main(["fit", "--config", "tiny.yaml"]) == 2
    error = capsys.readouterr().err
    assert "error: LEAKING at step 4: " in error
    assert "its losses depend on later text; the first module that does so is blocks.0.mixer (Opening)" in error
    assert record_of(newest_run())["blind"]["verdict"] == "LEAKING"
    assert not (newest_run() / "metrics.json").exists()


def test_a_leak_in_the_precision_of_the_run_alone_stops_it(leaky, capsys):
    Path("leaky_mixer.py").write_text(LEAKY.replace("keepdim=True)", "keepdim=True) * (x.dtype != torch.float64)"))
    message = leaky.refusal(capsys, "fit", "--config", "tiny.yaml")
    assert "in the run's own precision and on its device" in message


def test_a_leak_that_training_opens_marks_run_and_checkpoint_where_it_is_let_through(opening, capsys):
    with pytest.warns(UserWarning, match="LEAKING at step 4: .* blocks.0.mixer"):
        folder = opening.fit("--model.audit", "warn")
    assert metrics_of(folder)["leaking"] is True
    capsys.readouterr()
    assert main(["audit", "--ckpt_path", str(folder / "checkpoints/last.ckpt"), "--trust", "opening_mixer"]) == 1
    assert "LEAKING" in (shown := " ".join(capsys.readouterr().out.split()))
    assert "with the future hidden" in shown
    opening.run("validate", "--ckpt_path", folder / "checkpoints/last.ckpt", "--trust", "opening_mixer")
    assert "LEAKING" in capsys.readouterr().out.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("x[:, 1:]", "model.network: blocks.0.mixer (Leaky) gives (1, 7, 8) for (1, 8, 8)"),
        ("(x, None)", "model.network: blocks.0.mixer (Leaky) gives a tuple for (1, 8, 8)"),
        ("x.unpack()", "leaky_mixer.py, line 11, in forward: AttributeError: 'Tensor' object has no attribute"),
    ],
)
def test_a_mistake_in_a_mixer_of_ones_own_is_said_with_its_name_or_line(leaky, capsys, returned, expected):
    Path("leaky_mixer.py").write_text(LEAKY.replace("x.mean(1, keepdim=True) * self.weight + x", returned))
    assert expected in leaky.refusal(capsys, "fit", "--config", "tiny.yaml")
