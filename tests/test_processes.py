"""One process or many, the same numbers: DDP over gloo on the CPU, through the command line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback

from llmx.cli import main
from testbed.forked import forked_ranks
from testbed.tiny import TEXT, network
from tests.laboratory import Laboratory, curves_of, newest_run, working_in

pytestmark = pytest.mark.xdist_group("processes")  # the fixture's runs once, whatever the number of workers

CHECKOUT = Path(__file__).parent.parent
# 118 training windows, so step 15 ends an epoch with 6 of 8; 42 validation windows, so the last batch has 2 of 8
DATA = {"corpus": "corpus.txt", "window": 16, "batch_size": 8, "split": [0.03, 0.15, 0.82]}
TRAINER = {"max_steps": 20, "val_check_interval": 10, "gradient_clip_val": 1.0, "accelerator": "cpu"}
SHARDED = ["--trainer.strategy=ModelParallelStrategy", "--trainer.strategy.save_distributed_checkpoint=false"]
# "ddp" starts Python anew for every rank, as a user's command does; a fork has imported everything already
WAYS = {
    "1": ["--trainer.devices=1"],
    "2": ["--trainer.devices=2", "--trainer.strategy=ddp"],
    "4": ["--trainer.devices=4", "--trainer.strategy=ddp_fork"],
    "2 x 4 micro-batches": [
        "--trainer.devices=2",
        "--trainer.strategy=ddp_fork",
        "--trainer.accumulate_grad_batches=4",
    ],
    "2 that share": ["--trainer.devices=2", SHARDED[0]],  # the name alone
    "2 of which none is whole": ["--trainer.devices=2", *SHARDED, "--model.audit=off"],
}


def ranks(command):
    """Starts two processes from outside, as torchrun does. Returns their exit codes and the output of rank 0."""
    started = forked_ranks(Path.cwd(), command, {})
    return [process.wait(60) for process in started], started[0].output


def configure(laboratory):
    laboratory.configure(trainer=TRAINER, data=DATA, model={"network": network(2)})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of one fit in all ways."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch, working_in(folder, patch):
        configure(Laboratory(folder))
        found = {}
        for name, options in WAYS.items():
            command = ["fit", "--config", "tiny.yaml", *options]
            if "--trainer.strategy=ddp" in options:
                subprocess.run([sys.executable, CHECKOUT / "main.py", *command], check=True, timeout=300)
            elif SHARDED[0] in options:
                assert ranks(command)[0] == [0, 0]
            else:
                assert main(command) == 0
            found[name] = newest_run().absolute()
        yield found


def curve(folder, tag):
    return dict(curves_of(folder)[tag])


@pytest.mark.parametrize("name", list(WAYS)[1:])
def test_every_step_has_the_same_loss(runs, name):
    """Each step's batch has a loss of its own, so this holds the order of the batches too. Gradients are summed in
    another order: 1e-5 after 20 steps in fp32."""
    expected = curve(runs["1"], "train/loss")
    assert len({round(value, 4) for value in expected.values()}) == 20
    assert curve(runs[name], "train/loss") == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", WAYS)
def test_the_validation_counts_every_character_once(runs, name):
    """To 1e-6, of weights that differ by rounding: a character too many or too few would show in the third decimal."""
    characters = np.load(runs[name] / "val_losses.npy")
    np.testing.assert_allclose(characters, np.load(runs["1"] / "val_losses.npy"), atol=1e-5)
    assert len(characters) == int(0.15 * len(TEXT)) - 1  # all but the first
    metrics = json.loads((runs[name] / "metrics.json").read_text())
    assert metrics["val/loss"] == pytest.approx(characters.mean(dtype=np.float64), abs=1e-6)
    assert curve(runs[name], "val/loss") == pytest.approx(curve(runs["1"], "val/loss"), abs=1e-6)
    assert metrics["tokens"] == 20 * 8 * 16  # as the config says, over all processes and micro-batches


@pytest.mark.parametrize("name", ["2", "2 of which none is whole"])
def test_one_process_and_four_validate_a_checkpoint_alike(runs, capsys, name):
    command = ["validate", "--ckpt_path", str(runs[name] / "checkpoints/last.ckpt"), "--trainer.accelerator", "cpu"]
    said = []
    for options in (["--trainer.devices=1"], ["--trainer.devices=4", "--trainer.strategy=ddp_fork"]):
        assert main([*command, *options]) == 0
        said.append(capsys.readouterr().out.splitlines()[-1])
    assert said[0] == said[1]
    assert f"val loss {curve(runs[name], 'val/loss')[19]:.4f} " in said[0]


def test_a_part_of_the_split_is_told_by_processes_that_the_command_forked(runs, capsys):
    command = ["validate", "--ckpt_path", str(runs["1"] / "checkpoints/last.ckpt"), "--trainer.accelerator=cpu"]
    assert main([*command, "--trainer.limit_val_batches=3", *WAYS["4"]]) == 0
    assert "Only 50 % of this val split was measured" in capsys.readouterr().out  # 3 batches of 6


class PowerCut(Callback):
    """Rank one is gone at step 5, without a word to the others."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_rank == 1 and trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_ends_the_others_with_a_message(runs, monkeypatch):
    monkeypatch.chdir(runs["1"].parents[1])
    options = [*WAYS["2"], "--trainer.callbacks+=tests.test_processes.PowerCut"]
    codes, said = ranks(["fit", "--config", "tiny.yaml", *options])
    assert codes == [2, -signal.SIGKILL]
    assert "error: trainer: another process of this run is gone" in said


def test_a_sharded_network_says_what_it_does_not_do(runs, monkeypatch):
    monkeypatch.chdir(runs["1"].parents[1])
    command = ["predict", "--ckpt_path", str(runs["2"] / "checkpoints/last.ckpt"), "--trainer.accelerator=cpu"]
    codes, said = ranks([*command, *WAYS["2 that share"]])
    assert codes == [2, 2]
    assert "error: trainer.strategy: a sharded network does not generate" in said


def test_a_process_that_finds_a_fault_is_quoted(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs["1"].parents[1])
    options = ["--trainer.devices=2", "--trainer.strategy=ddp_fork", "--model.optimizer.lr=1e30"]
    assert main(["fit", "--config", "tiny.yaml", *options]) == 2
    error = capsys.readouterr().err
    assert "error: trainer: process " in error
    assert "training has diverged" in error.splitlines()[-1]


def test_what_cannot_be_shared_is_refused_before_anything_is_started(laboratory, capsys):
    configure(laboratory)
    laboratory.configure(trainer={"devices": 2})
    scalars = "--model.network.init_args.block=ReZeroBlock"
    average = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"]
    for options, said in ([scalars], "mixer_gain has no dimensions"), (average, "trainer.callbacks: "):
        assert main(["fit", "--config", "tiny.yaml", SHARDED[0], *options]) == 2
        assert said in capsys.readouterr().err
    assert not Path("lightning_logs").exists()
