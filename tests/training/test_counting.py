"""A network that counts goes through the same verbs as any other, and is done after one step."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from llmx import LanguageModel
from llmx.data.datamodule import TextDataModule
from llmx.networks.ngram import NGram
from llmx.training.trainer import Trainer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "old", "trees", "sleep"]
QUIET = ["--trainer.enable_progress_bar", "false"]


@pytest.fixture
def laboratory(laboratory):
    laboratory.write_corpus(" ".join(np.random.default_rng(0).choice(WORDS, 900)))
    laboratory.config |= {
        "trainer": {"max_steps": 1, "gradient_clip_val": 1.0, "enable_progress_bar": False},
        "data": {"corpus": "corpus.txt", "window": 12, "batch_size": 4},
        "model": {"network": {"class_path": "NGram", "init_args": {"order": 4}}, "sampling": {"max_new_tokens": 12}},
    }
    del laboratory.config["seed_everything"]
    laboratory.configure()
    return laboratory


def metrics() -> dict:
    return json.loads(Path("lightning_logs/version_0/metrics.json").read_text())


def test_fit_counts_the_training_split_once_and_measures_the_whole_validation_split(laboratory, capsys, recwarn):
    # more steps and a log at every one change nothing
    laboratory.run("fit", "--config", "tiny.yaml", "--trainer.max_steps", 3, "--trainer.log_every_n_steps", 1)
    assert metrics()["step"] == 1
    assert f"val loss {metrics()['val/loss']:.4f}" in capsys.readouterr().out.splitlines()[-1]
    assert not [warning for warning in recwarn if "optimizer" in str(warning.message) or "clip" in str(warning.message)]

    data = TextDataModule(corpus="corpus.txt", window=12, batch_size=4)
    network = NGram(data.tokenizer.vocab_size, 4)
    network.learn(torch.from_numpy(data.tokens("train").astype(np.int64)))
    batches = [(network.losses(b.inputs, b.targets)[0], b.targets) for b in data.val_dataloader()]
    expected = sum(losses.double().sum() for losses, _ in batches) / sum((t >= 0).sum() for _, t in batches)
    assert metrics()["val/loss"] == pytest.approx(expected.item(), abs=1e-6)
    record = json.loads(Path("lightning_logs/version_0/run.json").read_text())
    assert (record["steps"], record["parameters"], record["leaking"]) == (1, 0, False)


def test_every_verb_takes_its_checkpoint(laboratory, capsys):
    laboratory.run("fit", "--config", "tiny.yaml")
    loss = f"val loss {metrics()['val/loss']:.4f}"
    capsys.readouterr()
    laboratory.run("validate", "--ckpt_path", "last", *QUIET)
    assert loss in capsys.readouterr().out
    laboratory.run("audit", "--ckpt_path", "last", *QUIET)
    assert "no leak" in capsys.readouterr().out
    laboratory.run("predict", "--ckpt_path", "last", "--data.prompts", "the ", *QUIET)
    record = json.loads(Path("lightning_logs/version_0/predictions/0.jsonl").read_text())
    assert len(record["completion"]) == 12
    laboratory.run("fit", "--ckpt_path", "last", *QUIET)  # a finished run: nothing is left to do
    assert metrics()["step"] == 1
    laboratory.run("fit", "--ckpt_path", "last", "--trainer.max_steps", 2, *QUIET)
    assert loss in capsys.readouterr().out
    laboratory.run(
        "validate", "--ckpt_path", "last", "--config", "tiny.yaml", "--model.network.order", 3, *QUIET, code=2
    )
    assert "network.predicting.2.keys has shape" in capsys.readouterr().err


def test_the_audit_sees_the_network_that_has_counted(laboratory, monkeypatch):
    audited = []
    monkeypatch.setattr(
        "llmx.training.trainer.audit_causality", lambda network, window, text: audited.append(network.learned)
    )
    with pytest.raises(AttributeError):  # there is no report
        laboratory.run("audit", "--config", "tiny.yaml")
    assert audited == [True]


def test_more_processes_than_one_are_refused_in_a_sentence(laboratory, capsys):
    arguments = ["--trainer.accelerator", "cpu", "--trainer.devices", 2]
    laboratory.run("fit", "--config", "tiny.yaml", *arguments, code=2)
    assert "error: trainer.devices: " in capsys.readouterr().err
    assert not Path("lightning_logs").exists()


def test_it_counts_in_a_notebook_too(laboratory):
    data = TextDataModule(corpus="corpus.txt", window=12, batch_size=4)
    model = LanguageModel(partial(NGram, order=4), data.tokenizer, window=12)
    trainer = Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, devices=1)
    trainer.fit(model, datamodule=data)
    assert model.network.learned
    assert len(model.generate("the", max_new_tokens=5)) == 8
