"""One process or many, the same numbers: DDP over gloo on the CPU, through the command line."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmx.cli import main
from tests.tiny import TEXT, network, newest_run

pytestmark = pytest.mark.xdist_group("processes")  # the fixture's runs once, whatever the number of workers

CHECKOUT = Path(__file__).parent.parent
# 142 training windows, so step 18 ends an epoch with 6 of 8; 50 validation windows, so the last batch has 2 of 8
DATA = {"corpus": "corpus.txt", "window": 16, "batch_size": 8, "split": [0.03, 0.15, 0.82]}
TRAINER = {
    "max_steps": 20,
    "val_check_interval": 10,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "gradient_clip_val": 1.0,
    "accelerator": "cpu",
    "precision": "32-true",
}
# "ddp" starts Python anew for every rank, as a user's command does; a fork has imported everything already
WAYS = {"1": [1, 1, "auto"], "2": [2, 1, "ddp"], "4": [4, 1, "ddp_fork"], "2 x 4 micro-batches": [2, 4, "ddp_fork"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the same fit, on 1, 2 and 4 processes, and on 2 that accumulate."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LLMX_CACHE", str(folder / "cache"))
        Path("corpus.txt").write_text(TEXT)
        config = {"seed_everything": 3, "trainer": TRAINER, "model": {"network": network(2)}, "data": DATA}
        Path("tiny.yaml").write_text(yaml.safe_dump(config))
        found = {}
        for name, (devices, accumulate, strategy) in WAYS.items():
            options = [f"--trainer.devices={devices}", f"--trainer.accumulate_grad_batches={accumulate}"]
            command = ["fit", "--config", "tiny.yaml", *options, f"--trainer.strategy={strategy}"]
            if strategy == "ddp":
                subprocess.run([sys.executable, CHECKOUT / "main.py", *command], check=True, timeout=300)
            else:
                assert main(command) == 0
            found[name] = newest_run().absolute()
        yield found


def curve(folder, tag):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


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


def test_one_process_and_four_validate_a_checkpoint_alike(runs, capsys):
    command = ["validate", "--ckpt_path", str(runs["2"] / "checkpoints/last.ckpt"), "--trainer.accelerator", "cpu"]
    said = []
    for options in (["--trainer.devices=1"], ["--trainer.devices=4", "--trainer.strategy=ddp_fork"]):
        assert main([*command, *options]) == 0
        said.append(capsys.readouterr().out.splitlines()[-1])
    assert said[0] == said[1]
    assert f"val loss {curve(runs['2'], 'val/loss')[19]:.4f} " in said[0]


class PowerCut(Callback):
    """Rank one is gone at step 5, without a word to the others."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_rank == 1 and trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def rank(number, port, folder):
    """A process that was started from outside, as torchrun or a cluster does: nobody watches over it."""
    os.chdir(folder)
    os.environ |= {"LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.callbacks+=tests.test_processes.PowerCut"]
    sys.exit(main(["fit", "--config", str(folder / "tiny.yaml"), *options, f"--data.corpus={folder / 'corpus.txt'}"]))


def test_a_process_that_is_killed_ends_the_others_with_a_message(runs, capfd):
    fork = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [fork.Process(target=rank, args=(number, port, runs["1"].parents[1])) for number in (0, 1)]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [2, -signal.SIGKILL]
    finally:
        for process in ranks:
            process.kill()
    assert "error: trainer: another process of this run is gone" in capfd.readouterr().err


def test_a_process_that_finds_a_fault_is_quoted(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs["1"].parents[1])
    options = ["--trainer.devices=2", "--trainer.strategy=ddp_fork", "--model.optimizer.lr=1e30"]
    assert main(["fit", "--config", "tiny.yaml", *options]) == 2
    error = capsys.readouterr().err
    assert "error: trainer: process " in error
    assert "training has diverged" in error.splitlines()[-1]
