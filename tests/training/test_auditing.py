"""The audit of a fit runs in every trainer, also in a notebook whose trainer has no callbacks."""

import lightning.pytorch as pl
import pytest

from llmx import LanguageModel
from llmx.audits.causality_report import CausalityError
from llmx.data.datamodule import TextDataModule
from llmx.protocol import Mixer
from llmx.training.auditing import CausalityAudit
from tests.training.networks import factory


class Reversing(Mixer):
    def __init__(self, site):
        super().__init__()

    def forward(self, x, context):
        return x.flip(1)


def notebook(network, **settings):
    data = TextDataModule(corpus="corpus.txt", window=8, batch_size=4)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", devices=1, **quiet)
    return LanguageModel(network, data.tokenizer, window=8, **settings), data, trainer


def audits(trainer):
    return sum(isinstance(callback, CausalityAudit) for callback in trainer.callbacks)


def test_a_leak_stops_a_bare_trainer_before_the_first_step(laboratory):
    model, data, trainer = notebook(factory(Reversing))
    with pytest.raises(CausalityError, match="Reversing"):
        trainer.fit(model, datamodule=data)
    assert trainer.global_step == 0


def test_a_leak_that_is_allowed_marks_the_run(laboratory):
    model, data, trainer = notebook(factory(Reversing), audit="warn")
    trainer.fit(model, datamodule=data)
    assert model.leaking
    assert trainer.global_step == 1


def test_a_trainer_that_fits_twice_audits_once_and_an_audit_of_the_user_replaces_none(laboratory, monkeypatch):
    model, data, trainer = notebook(factory())
    runs = []
    monkeypatch.setattr("llmx.training.auditing.audit_live_run", lambda *_, **named: runs.append(named["perturb"]))
    trainer.fit(model, datamodule=data)
    report = model.causality
    trainer.fit(model, datamodule=data)
    assert model.causality is report
    assert runs.count(True) == 1
    assert audits(trainer) == 1
    assert "CausalityAudit" not in trainer._checkpoint_connector.dump_checkpoint(weights_only=False)["callbacks"]

    class Silent(CausalityAudit):
        def setup(self, *_, **__):
            pass

    model, data, trainer = notebook(factory(Reversing))
    trainer.callbacks.append(Silent())
    with pytest.raises(CausalityError):
        trainer.fit(model, datamodule=data)
