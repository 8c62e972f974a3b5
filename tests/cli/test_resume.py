"""Continuing a run, starting from another run's weights, and what stands in the way."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llmx.cli import main
from tests.laboratory import curves_of, metrics_of, newest_run, weights_of

POWER_CUT = """
from lightning.pytorch.callbacks import Callback

class PowerCut(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7:
            raise RuntimeError("power cut")
"""


def test_resuming_continues_the_run_as_if_it_had_not_stopped(laboratory):
    whole = laboratory.fit("--trainer.max_steps", 12)
    Path("power_cut.py").write_text(POWER_CUT)
    with pytest.raises(RuntimeError, match="power cut"):
        main(["fit", "--config", "tiny.yaml", "--trainer.max_steps", "12", "--trainer.callbacks", "power_cut.PowerCut"])
    laboratory.run("fit", "--ckpt_path", "last", "--trainer.callbacks", "null")
    assert {path.name for path in Path("lightning_logs").iterdir()} == {"version_0", "version_1"}
    part = Path("lightning_logs/version_1")
    assert all(torch.equal(value, weights_of(part)[name]) for name, value in weights_of(whole).items())
    for tag in ("train/loss", "val/loss", "lr", "loss_by_tokens/train", "loss_by_tokens/val"):
        assert curves_of(part)[tag] == curves_of(whole)[tag]
    assert metrics_of(part)["val/loss"] == metrics_of(whole)["val/loss"]


def test_the_command_line_beats_the_checkpoint_and_the_run(laboratory):
    folder = laboratory.fit()
    checkpoint = folder / "checkpoints/last.ckpt"
    laboratory.run("fit", "--ckpt_path", checkpoint, "--trainer.max_steps", 8, "--model.optimizer.lr", 0.5)
    resumed = torch.load(checkpoint, weights_only=True)
    assert resumed["hyper_parameters"]["optimizer"]["init_args"]["lr"] == 0.5
    assert resumed["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.5
    rates = dict(curves_of(folder)["lr"])
    assert rates[7] > 0.01  # the old run's rate was at most 0.003


def test_warm_start_begins_with_another_runs_weights(laboratory):
    first = laboratory.fit()
    laboratory.fit(
        "--model.warm_start", first / "checkpoints/last.ckpt", "--model.optimizer.lr", 0.0, "--trainer.max_steps", 1
    )
    before, after = weights_of(first), weights_of(Path("lightning_logs/version_1"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_files_of_a_run_that_were_changed_are_named(laboratory, capsys):
    folder = laboratory.fit()
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    torch.save({**checkpoint, "llmx": None}, "changed.ckpt")
    assert "changed.ckpt" in laboratory.refusal(capsys, "validate", "--ckpt_path", "changed.ckpt")
    del checkpoint["optimizer_states"]  # as ModelCheckpoint does with save_weights_only
    torch.save(checkpoint, "weights.ckpt")
    assert "weights.ckpt holds weights alone" in laboratory.refusal(capsys, "fit", "--ckpt_path", "weights.ckpt")
    metrics = metrics_of(folder)
    (folder / "metrics.json").write_text(json.dumps({**metrics, "val/loss": 1e-5}))  # a number for JSON, text for YAML
    np.save(folder / "val_losses.npy", np.full_like(np.load(folder / "val_losses.npy"), 1e-5))
    laboratory.run("compare", folder)
    (folder / "metrics.json").write_text(json.dumps({**metrics, "seconds": "many"}))
    assert "metrics.json: seconds is missing or damaged" in laboratory.refusal(capsys, "compare", folder)
    (folder / "config.yaml").write_text("a: b")
    assert "a: no such key" in laboratory.refusal(capsys, "fit", "--ckpt_path", "last")


def test_damaged_and_foreign_checkpoints_are_refused(laboratory, capsys):
    checkpoint = laboratory.fit() / "checkpoints/last.ckpt"
    content = checkpoint.read_bytes()
    Path("cut.ckpt").write_bytes(content[: len(content) // 2])
    Path("empty.ckpt").write_bytes(b"")
    torch.save({"weights": torch.zeros(3)}, "foreign.ckpt")
    for name in ("cut.ckpt", "empty.ckpt"):
        assert f"{name} is damaged" in laboratory.refusal(capsys, "validate", "--ckpt_path", name)
    assert "not a checkpoint of a LanguageModel" in laboratory.refusal(
        capsys, "validate", "--ckpt_path", "foreign.ckpt"
    )
    message = laboratory.refusal(
        capsys, "validate", "--config", "tiny.yaml", "--model.network.dim", 16, "--ckpt_path", checkpoint
    )
    assert "another network" in message


class Exploit:
    def __reduce__(self):
        return (Path("executed").touch, ())


def test_a_checkpoint_with_code_is_refused_and_nothing_runs(laboratory, capsys):
    torch.save({"state_dict": {}, "hyper_parameters": {"network": Exploit()}}, "exploit.ckpt")
    assert "refused" in laboratory.refusal(capsys, "predict", "--ckpt_path", "exploit.ckpt")
    assert not Path("executed").exists()


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(laboratory, capsys):
    laboratory.configure(trainer={"max_steps": 40, "val_check_interval": 1, "gradient_clip_val": None})
    code = main(["fit", "--config", "tiny.yaml", "--model.optimizer.lr", "1e30"])
    error = capsys.readouterr().err
    assert code == 2
    assert "training has diverged" in error
    assert "last good checkpoint" in error
    state = torch.load(newest_run() / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
