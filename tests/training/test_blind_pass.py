"""The blind pass of a run: when it runs, how much it reads, where its result stands; and the training loss."""

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml

from llmx.cli import main
from tests.laboratory import curves_of, metrics_of, newest_run, record_of

OBJECTIVES = """
import torch.nn.functional as F
from llmx.networks.decoder import Decoder

class Halved(Decoder):
    def losses(self, tokens, targets):
        losses, auxiliary = super().losses(tokens, targets)
        return losses / 2, auxiliary

class Counting(Decoder):
    passes = 0

    def hidden(self, tokens):
        self.passes += self.training
        return super().hidden(tokens)

    def losses(self, tokens, targets):
        assert self.passes < 8  # of 7 steps: the lab runs a copy for its training loss
        return super().losses(tokens, targets)
"""


@pytest.fixture
def laboratory(laboratory):
    text = "".join(np.random.default_rng(0).choice(list("abcdefg \n"), 4000))
    laboratory.write_corpus(text)  # 400 characters to validate: 13 batches of 4 windows of 8
    laboratory.configure(trainer={"max_steps": 7, "val_check_interval": 3, "check_val_every_n_epoch": None})
    return laboratory


def shares(run: Path) -> list[float]:
    return [value for _, value in curves_of(run)["val/blind"]]


def test_the_last_validation_is_scored_whole_and_each_earlier_one_in_part(laboratory, capsys, monkeypatch):
    from llmx.audits import blind

    rows = []
    original = blind.blind_pass
    monkeypatch.setattr(blind, "blind_pass", lambda *given: (rows.append(len(given[2])), original(*given))[1])
    run = laboratory.fit()
    assert rows == [8, 8, 52]  # of 52 rows in 13 batches of 4: two batches are the tenth
    result = record_of(run)["blind"]
    assert (result["verdict"], result["largest"], result["share"]) == ("identical", 0.0, 1.0)
    assert result["characters"] == 50  # windows; the last two rows pad the batch
    assert result["loss"] == pytest.approx(metrics_of(run)["val/loss"])
    assert capsys.readouterr().out.strip().splitlines()[-1].count("blind: identical") == 1
    curves = curves_of(run)
    assert np.array(curves["val/blind"]) == pytest.approx(np.array(curves["val/loss"]))


def test_validate_and_test_are_scored_twice_too(laboratory, capsys):
    run = laboratory.fit("--data.split", "[0.8, 0.1, 0.1]")
    for verb in ("validate", "test"):
        capsys.readouterr()
        laboratory.run(verb, "--ckpt_path", run / "checkpoints/last.ckpt")
        assert "blind: identical." in capsys.readouterr().out.strip().splitlines()[-1]


def test_without_an_audit_there_is_no_blind_pass(laboratory, capsys):
    run = laboratory.fit("--model.audit", "off")
    assert "blind" not in capsys.readouterr().out.strip().splitlines()[-1]
    assert "blind" not in record_of(run)
    assert "val/blind" not in curves_of(run)


def test_forked_processes_judge_together_and_the_last_line_knows(laboratory, capfd):
    run = laboratory.fit("--trainer.devices", 2, "--trainer.strategy", "ddp_fork", "--trainer.accelerator", "cpu")
    assert record_of(run)["blind"]["verdict"] == "identical"
    assert record_of(run)["blind"]["characters"] == 50
    assert "blind: identical" in capfd.readouterr().out.strip().splitlines()[-1]


def test_averaged_weights_are_those_that_are_scored_again(laboratory):
    averaging = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}
    laboratory.configure(trainer={"callbacks": [averaging]})
    assert record_of(laboratory.fit())["blind"]["verdict"] == "identical"


def test_compare_shows_what_the_blind_pass_found(laboratory, capsys):
    laboratory.fit()
    laboratory.fit("--seed_everything", 4)
    capsys.readouterr()
    laboratory.run("compare", "lightning_logs", "--out", "compared")
    assert "identical" in capsys.readouterr().out
    assert "<td>identical</td>" in Path("compared/report.html").read_text()
    with open("compared/comparison.csv") as file:
        assert [row["blind"] for row in csv.DictReader(file)] == ["identical"]


def own_objective(laboratory, name):
    Path("objectives.py").write_text(OBJECTIVES)
    laboratory.config["model"]["network"]["class_path"] = f"objectives.{name}"
    laboratory.configure()
    return laboratory


def test_a_halved_objective_is_no_lower_training_loss(laboratory):
    plain = curves_of(laboratory.fit())
    curves = curves_of(own_objective(laboratory, "Halved").fit())
    losses, halves = (np.array(curves[f"train/{name}"])[:, 1] for name in ("loss", "objective"))
    assert halves == pytest.approx(losses / 2, rel=1e-5)  # the same forward pass, so float32 rounds alike
    assert losses[0] == pytest.approx(plain["train/loss"][0][1], rel=1e-6)
    assert "train/objective" not in plain


def test_the_training_loss_of_an_objective_of_its_own_costs_the_network_no_pass(laboratory):
    own_objective(laboratory, "Counting").fit()


def test_the_training_loss_is_the_mean_over_micro_batches(laboratory):
    own_objective(laboratory, "Halved")
    whole, halves = (
        np.array(curves_of(laboratory.fit("--trainer.accumulate_grad_batches", parts))["train/loss"])
        for parts in (1, 2)
    )
    assert halves == pytest.approx(whole)


def test_a_sum_of_probabilities_above_one_ends_the_run_before_it_begins(laboratory, capsys):
    Path("generous.py").write_text(
        "from llmx.networks.ngram import NGram\n\nclass Generous(NGram):\n"
        "    def prefill(self, tokens, state):\n        logits, state = super().prefill(tokens, state)\n"
        "        return logits + 1, state\n"
    )
    laboratory.config["model"]["network"] = {"class_path": "generous.Generous", "init_args": {"order": 3}}
    Path("generous.yaml").write_text(yaml.safe_dump(laboratory.config))
    assert main(["fit", "--config", "generous.yaml"]) == 2
    assert "the probabilities of Generous sum to 2.718" in capsys.readouterr().err
    assert not Path("lightning_logs").exists()


def test_an_early_stop_says_how_much_was_scored_twice(laboratory, capsys):
    stopping = {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {"monitor": "val/loss", "patience": 1, "mode": "max"},
    }
    laboratory.configure(trainer={"callbacks": [stopping]})
    laboratory.fit("--trainer.max_steps", 30)
    assert record_of(newest_run())["blind"]["share"] == pytest.approx(2 / 13)
    assert "blind: identical (15.4 % of the split)" in capsys.readouterr().out.strip().splitlines()[-1]
