"""A run that is killed, signalled or requeued and then resumes equals an undisturbed run, bit by bit.

`benchmarks/robustness/faults` injects some hundred more such faults, at random moments.
"""

import json
import os
import signal
from pathlib import Path

import pytest

from llmx.runs.archive import read_checkpoint
from testbed.differences import differences
from testbed.forked import ForkedProcess, forked_ranks

STOPS = """
import os
from lightning.pytorch.callbacks import Callback

class Stops(Callback):
    \"\"\"Sends one of the processes a signal, in the second micro-batch of a step.\"\"\"

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        number, step, rank = map(int, os.environ["STOP"].split())
        here = trainer.global_step == step and trainer.global_rank == rank
        if number and here and batch_idx % 2:
            os.kill(os.getpid(), number)
"""
SICK = """
import os
from llmx.mixers.attention import Attention

class Sick(Attention):
    calls = 0

    def forward(self, x, context):
        mixed = super().forward(x, context)
        self.calls += self.training
        if self.training and self.calls == int(os.environ.get("SICK_AT", 0)):
            mixed.register_hook(lambda gradient: gradient * float("nan"))
        return mixed
"""


@pytest.fixture
def laboratory(laboratory, monkeypatch):
    """A run of 12 steps with dropout, of two micro-batches each, 5 steps an epoch."""
    monkeypatch.syspath_prepend(str(laboratory.folder))
    laboratory.config["model"]["network"]["init_args"]["dropout"] = 0.2
    trainer = {"max_steps": 12, "val_check_interval": 4, "accelerator": "cpu", "accumulate_grad_batches": 2}
    laboratory.configure(
        trainer=trainer | {"callbacks": [{"class_path": "stops.Stops"}]},
        data={"batch_size": 8, "split": [0.01, 0.1, 0.89]},
        model={"audit": "off"},
    )
    Path("stops.py").write_text(STOPS)
    return laboratory


def fit(laboratory, *arguments, devices=1, stop="0 0 0", **environment):
    """Fits in one process for each device; `stop` is signal, step and rank. Returns exit codes and rank 0's output."""
    command = ["fit", "--config", "tiny.yaml", "--trainer.devices", devices, *arguments]
    environment["STOP"] = stop
    if devices == 1:
        started = [ForkedProcess(laboratory.folder, command, environment)]
    else:
        started = forked_ranks(laboratory.folder, command, environment, devices)
    return [one.wait(90) for one in started], started[0].output


def test_a_run_that_is_killed_twice_is_the_whole_run(laboratory):
    """First before anything was validated, then in the middle of an epoch."""
    assert fit(laboratory)[0] == [0]
    assert fit(laboratory, stop=f"{signal.SIGKILL} 2 0")[0] == [-9]
    assert fit(laboratory, "--ckpt_path", "last", stop=f"{signal.SIGKILL} 9 0")[0] == [-9]
    assert fit(laboratory, "--ckpt_path", "last")[0] == [0]
    assert len(list(Path("lightning_logs").iterdir())) == 2
    assert differences(Path("lightning_logs/version_1"), Path("lightning_logs/version_0")) == ""
    assert fit(laboratory, "--ckpt_path", "last")[0] == [0]  # there is nothing left to do, and nothing is spoilt
    assert differences(Path("lightning_logs/version_1"), Path("lightning_logs/version_0")) == ""


def test_experts_that_count_their_tokens_resume_with_the_counts_of_training_alone(laboratory):
    """Audits and trials of both starts run on copies: no expert counts their tokens."""
    block = laboratory.config["model"]["network"]["init_args"]["block"]["init_args"]
    block["feed_forward"] = {"class_path": "DeepSeekMoE", "init_args": {"experts": 4, "top_k": 2, "hidden": 4}}
    laboratory.configure(model={"audit": "error"})
    assert fit(laboratory)[0] == [0]
    assert fit(laboratory, stop=f"{signal.SIGKILL} 6 0")[0] == [-9]
    assert fit(laboratory, "--ckpt_path", "last")[0] == [0]
    assert differences(Path("lightning_logs/version_1"), Path("lightning_logs/version_0")) == ""


def test_two_processes_that_are_killed_and_then_signalled_are_the_whole_run(laboratory):
    assert fit(laboratory, devices=2)[0] == [0, 0]
    codes, _ = fit(laboratory, devices=2, stop=f"{signal.SIGKILL} 6 1")
    assert codes[1] == -9
    assert codes[0] not in (0, None)  # no hang
    codes, output = fit(laboratory, "--ckpt_path", "last", devices=2, stop=f"{signal.SIGTERM} 9 1")
    assert codes == [143, 0]
    assert "SIGTERM at step 10: saved" in output
    assert fit(laboratory, "--ckpt_path", "last", devices=2)[0] == [0, 0]
    assert differences(Path("lightning_logs/version_1"), Path("lightning_logs/version_0")) == ""


def test_a_run_of_whole_epochs_is_signalled_at_the_ends_of_them(laboratory):
    """The last step of the last one is followed by its validation alone, and by no other step when it is resumed."""
    epochs = ("--trainer.max_steps", -1, "--trainer.max_epochs", 2)
    assert fit(laboratory, *epochs)[0] == [0]
    for version, step, code in ((1, 4, 143), (2, 9, 0)):
        assert fit(laboratory, *epochs, stop=f"{signal.SIGTERM} {step} 0")[0] == [code]
        assert fit(laboratory, *epochs, "--ckpt_path", "last")[0] == [0]
        assert differences(Path(f"lightning_logs/version_{version}"), Path("lightning_logs/version_0")) == ""


def test_dropout_is_the_same_however_a_batch_is_cut_into_slots(laboratory):
    """Two micro-batches of one process draw what two processes draw: the loss differs by rounding alone."""
    assert fit(laboratory)[0] == [0]
    assert fit(laboratory, "--trainer.accumulate_grad_batches", 1, devices=2)[0] == [0, 0]
    losses = [json.loads(Path(f"lightning_logs/version_{n}/metrics.json").read_text())["val/loss"] for n in (0, 1)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_slurm_queues_the_job_again_and_it_goes_on(laboratory):
    scontrol = laboratory.folder / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\necho "$@" >> asked\n')
    scontrol.chmod(0o755)
    slurm = {f"SLURM_{name}": "1" for name in ("NTASKS", "NTASKS_PER_NODE", "NNODES")}
    slurm |= {f"SLURM_{name}": "0" for name in ("PROCID", "LOCALID", "NODEID")}
    slurm |= {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "llmx", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    assert fit(laboratory)[0] == [0]
    codes, output = fit(laboratory, stop=f"{signal.SIGUSR1} 6 0", **slurm)
    assert codes == [128 + signal.SIGUSR1]
    assert "SIGUSR1 at step 7: saved" in output
    assert Path("asked").read_text() == "requeue 77\n"
    assert not list(laboratory.folder.glob("hpc_ckpt*"))
    assert fit(laboratory, "--ckpt_path", "last", **slurm)[0] == [0]
    assert differences(Path("lightning_logs/version_1"), Path("lightning_logs/version_0")) == ""


def test_weights_that_are_not_finite_do_not_take_the_place_of_the_last_good_ones(laboratory):
    """The loss before the last validation is still finite: its gradient alone is not."""
    Path("sick.py").write_text(SICK)
    mixer = '{"class_path": "sick.Sick", "init_args": {"heads": 2}}'
    codes, output = fit(laboratory, "--model.network.block.mixer", mixer, SICK_AT="24")
    assert codes == [2]
    assert "holds a number that is not finite at step 12: training has diverged" in output
    assert "last good checkpoint is" in output
    assert "Traceback" not in output
    state = read_checkpoint("lightning_logs/version_0/checkpoints/last.ckpt")
    assert state["global_step"] == 8
    assert all(value.isfinite().all() for value in state["state_dict"].values())
