"""Faults that end a process: SIGKILL at any moment, SIGINT, SIGTERM and SLURM's requeue signal."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import torch

from benchmarks.harness import CHECKOUT
from benchmarks.robustness.faults.laboratory import FaultLaboratory, damage, failure
from llmx.runs.archive import read_checkpoint

SCONTROL = '#!/bin/sh\necho "$@" >> requeued\n'


def killed(name: str, lab: FaultLaboratory, random: Random) -> str:
    """SIGKILL at any moment, in half of the cases twice. Then the same command resumes to the end."""
    for _ in range(random.choice([1, 2])):
        processes = lab.resume(name)
        if random.random() < 0.9:
            lab.wait_for_checkpoint(processes[0])
        time.sleep(random.uniform(0, 1.2 * lab.seconds(name)))
        for process in random.sample(processes, len(processes)):
            process.kill()
            time.sleep(random.choice([0, 0, 0.1]))
    return lab.loss_after_resuming(name)


def killed_in_write(lab: FaultLaboratory, random: Random) -> str:
    """SIGKILL at one byte of a checkpoint, or between the renames that follow its write."""
    write = random.randrange(1, 9)  # two at a validation, and one before the first step

    def before() -> None:
        """Counts the writes down and kills within the chosen one."""
        save, rename, left = torch.save, os.replace, [write]

        class Dying(io.FileIO):
            def write(self, data: Any) -> int:
                super().write(data[: random.randrange(len(data) + 1)])
                os.kill(os.getpid(), signal.SIGKILL)
                return 0

        def dying_save(checkpoint: Any, file: Any) -> None:
            left[0] -= 1
            save(checkpoint, Dying(file.name, "w") if left[0] == 0 and random.random() < 0.5 else file)

        def dying_rename(*names: Any) -> None:
            acts: list[Callable[[], None]] = [partial(rename, *names), lambda: None]
            for act in random.sample(acts, 2):
                act()
                if left[0] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        torch.save, os.replace = dying_save, dying_rename  # type: ignore[assignment]

    (process,) = lab.fit("plain", before=before)
    if process.wait() != -signal.SIGKILL:
        return f"not killed: {process.output[-300:]}"
    if lab.last.exists() and (lost := damage(lab.last)):
        return lost
    return lab.loss_after_resuming("plain")


def one_rank_killed(lab: FaultLaboratory, random: Random) -> str:
    """One of two processes is killed. The other one has to end with an error within a minute."""
    processes = lab.fit("processes")
    lab.wait_for_checkpoint(processes[0])
    time.sleep(random.uniform(0, lab.seconds("processes")))
    victim = random.randrange(2)
    processes[victim].kill()
    code = processes[1 - victim].wait(60)
    if code is None:
        return f"process {1 - victim} hangs after the other died: {processes[1 - victim].output[-300:]}"
    if code == 0 and processes[victim].process.exitcode != 0 and not (lab.run / "metrics.json").exists():
        return "the surviving process ended with exit code 0"
    return lab.loss_after_resuming("processes")


def signalled(lab: FaultLaboratory, random: Random) -> str:
    """SIGINT or SIGTERM to one or both of two processes: saved within a step, exit code 128 + signal."""
    number = random.choice([signal.SIGINT, signal.SIGTERM])
    processes = lab.fit("processes")
    lab.wait_for_checkpoint(processes[0])
    time.sleep(random.uniform(0.05, 0.6 * lab.seconds("processes")))
    for process in random.choice([processes, processes[:1], processes[1:]]):
        process.send(number)
    codes = [process.wait() for process in processes]
    if codes[0] == 0 and (lab.run / "metrics.json").exists():
        return lab.loss_against_reference("processes")  # the run had ended before the signal
    if codes != [128 + number, 0] or f"{number.name} at step" not in processes[0].output:
        return f"exit codes {codes} for signal {number}: {processes[0].output[-300:]} {processes[1].output[-300:]}"
    return lab.loss_after_resuming("processes")


def signalled_command(lab: FaultLaboratory, random: Random) -> str:
    """Ctrl-C or SIGTERM from outside to `python main.py fit` on two devices, which starts the second process."""
    number = random.choice([signal.SIGINT, signal.SIGTERM])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LLMX_CACHE": str(lab.folder / "cache")}
    arguments = ["fit", "--config", "processes.yaml", "--trainer.max_steps", "100000", "--model.compile", "false"]
    command = [sys.executable, str(CHECKOUT / "main.py"), *arguments]
    with subprocess.Popen(
        command,
        cwd=lab.folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while process.poll() is None and not lab.last.exists():
            time.sleep(0.05)
        time.sleep(random.uniform(0.2, 2))
        # Ctrl-C reaches all processes of a terminal, SIGTERM only the one that it is sent to
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        try:
            errors = process.communicate(timeout=60)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "hangs"
    if process.returncode != 128 + number:
        return f"exit code {process.returncode} for signal {number}: {errors[-600:]}"
    step = read_checkpoint(lab.last)["global_step"]
    return "" if f"at step {step}: saved" in errors else f"step {step} is saved, but: {errors[-600:]}"


def requeued(lab: FaultLaboratory, random: Random) -> str:
    """SLURM's signal before a job's time ends: the run saves and requeues the job, and the next job resumes it."""
    scontrol = lab.folder / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(SCONTROL)
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "llmx"}
    slurm |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
    slurm["PATH"] = f"{scontrol.parent}:{os.environ['PATH']}"
    (process,) = lab.fit("dropout", environment=slurm)
    lab.wait_for_checkpoint(process)
    time.sleep(random.uniform(0.05, 0.6 * lab.seconds("dropout")))
    process.send(signal.SIGUSR1)
    code = process.wait()
    if code == 0 and (lab.run / "metrics.json").exists():
        return lab.loss_against_reference("dropout")
    asked = lab.folder / "requeued"
    if code != 128 + signal.SIGUSR1 or not asked.exists() or asked.read_text() != "requeue 77\n":
        return f"exit code {code}, not requeued: {process.output[-600:]}"
    if left := list(lab.folder.glob("hpc_ckpt*")):
        return f"{left} beside the run's own checkpoint"
    return failure(lab.resume("dropout", environment=slurm)) or lab.loss_against_reference("dropout")
