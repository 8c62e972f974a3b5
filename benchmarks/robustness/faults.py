"""What a fault costs: some hundred faults on purpose, each followed by what a user would do next, and a table of what
was lost.

A fault is a function that gets a laboratory of its own (an empty folder) and a source of chance, injects itself, and
returns what was lost, "" for nothing. Training is on a network that takes a second, in forked processes of one thread.

    python -m benchmarks.robustness.faults --out docs/results/faults.json
    python -m benchmarks.robustness.faults --only kill --count 20 --seed 7
"""

from __future__ import annotations

import argparse
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import llmx.cli
from benchmarks.harness import CHECKOUT
from benchmarks.robustness.forked import Command, differences, processes
from llmx.data import corpora
from llmx.data.datamodule import TextDataModule
from llmx.data.token_files import open_tokens, write_tokens
from llmx.data.tokenizers import ByteTokenizer
from llmx.errors import UserError
from llmx.runs.archive import read_checkpoint
from tests.tiny import TEXT, network

SICK = '''
import os
import torch
from llmx.mixers.attention import Attention

class Sick(Attention):
    """Falls ill in one process at a call in training, SICK_AT; SICK_IN says whether in forward or in backward."""
    calls = 0

    def forward(self, x, context):
        mixed = super().forward(x, context)
        if self.training and torch.is_grad_enabled():
            self.calls += 1
            here = os.environ.get("LOCAL_RANK", "0") == os.environ.get("SICK_PROCESS")
            if here and self.calls == int(os.environ["SICK_AT"]):
                ill = float(os.environ["SICK_WITH"])
                if os.environ["SICK_IN"] == "forward":
                    return mixed + ill
                mixed.register_hook(lambda gradient: gradient + ill)
        return mixed
'''
REQUEUED = '#!/bin/sh\necho "$@" >> requeued\n'


class Skipped(Exception):
    """The fault cannot be injected here; the message says why."""


# ------------------------------------------------------------------------------------------------- the laboratory
def config(
    mixer: str = "Attention", embedding_dropout: float = 0, dropout: float = 0, data: Any = (), trainer: Any = ()
) -> dict[str, Any]:
    """Settings of a fit of 16 steps that validates every 4."""
    small = network(depth=1)
    small["init_args"]["dropout"] = embedding_dropout
    attention = small["init_args"]["block"]["init_args"]["mixer"]
    attention["class_path"] = mixer
    if dropout:
        attention["init_args"]["dropout"] = dropout
    return {
        "seed_everything": 3,
        "trainer": {
            **{"max_steps": 16, "val_check_interval": 4, "log_every_n_steps": 1, "enable_progress_bar": False},
            **{"accelerator": "cpu", "precision": "32-true", **dict(trainer)},
        },
        "data": {"corpus": "corpus.txt", "window": 8, "batch_size": 8, **dict(data)},
        "model": {"audit": "off", "network": small},
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": config(),
    "accumulation": config(trainer={"accumulate_grad_batches": 2}),
    "dropout": config("ALiBiAttention", embedding_dropout=0.2, dropout=0.2),
    "epochs": config(data={"split": [0.01, 0.1, 0.89]}),  # of 6 steps
    "processes": config(embedding_dropout=0.2, trainer={"devices": 2}),
    "sick": config("sick.Sick"),
    "sick processes": config("sick.Sick", trainer={"devices": 2}),
}


@dataclass(frozen=True)
class Lab:
    """A folder with a corpus and configurations; `references` has, by setting, a run that nothing happened to."""

    folder: Path
    references: Path

    def prepare(self) -> Lab:
        self.folder.mkdir(parents=True)
        (self.folder / "corpus.txt").write_text(TEXT)
        (self.folder / "sick.py").write_text(SICK)
        for name, settings in SETTINGS.items():
            (self.folder / f"{name}.yaml").write_text(json.dumps(settings))
        return self

    @property
    def run(self) -> Path:
        return self.folder / "lightning_logs/version_0"

    @property
    def last(self) -> Path:
        return self.run / "checkpoints/last.ckpt"

    def fit(self, setting: str, *arguments: Any, environment: Any = (), **named: Any) -> list[Command]:
        """A fit that is begun, in as many processes as the setting has devices."""
        command = ["fit", "--config", f"{setting}.yaml", *arguments]
        environment = {"LLMX_CACHE": str(self.folder / "cache"), **dict(environment)}
        count = SETTINGS[setting]["trainer"].get("devices", 1)
        if count == 1:
            return [Command(self.folder, command, environment, **named)]
        return processes(self.folder, command, environment, count, **named)

    def go_on(self, setting: str, **named: Any) -> list[Command]:
        """The same command with --ckpt_path last; without where nothing was saved yet."""
        return self.fit(setting, *(["--ckpt_path", "last"] if self.last.exists() else []), **named)

    def wait_for_steps(self, command: Command) -> None:
        while command.process.is_alive() and not self.last.exists():
            time.sleep(0.005)

    def seconds(self, setting: str) -> float:
        """Of the steps of a run to which nothing happened."""
        return json.loads((self.references / setting / "metrics.json").read_text())["seconds"]

    def resumed(self, setting: str) -> str:
        """What is lost when the run goes on to its end."""
        if lost := ended(self.go_on(setting)):
            return lost
        return self.compared(setting)

    def compared(self, setting: str) -> str:
        found = sorted(path.name for path in self.run.parent.iterdir())
        newest = self.run.parent / found[-1]  # version_1 where the first died before it saved anything
        return differences(newest, self.references / setting)


def ended(commands: list[Command], code: int = 0) -> str:
    """What went wrong with commands that were to end with a code, the first one at least."""
    codes = [command.wait(90) for command in commands]
    if None in codes:
        return f"hangs: {[command.said[-300:] for command in commands]}"
    if codes[0] != code:
        return f"exit codes {codes}, not {code}: {commands[0].said[-600:]}"
    return ""


def refused(commands: list[Command], *words: str) -> str:
    """What is wrong with the refusal of a command: exit code 2, one line with some words, no traceback."""
    if lost := ended(commands, 2):
        return lost
    said = commands[0].said
    messages = [line for line in said.splitlines() if line.startswith("error:")]
    if "Traceback" in said or len(messages) != 1 or not all(word in messages[0] for word in words):
        return f"no single message with {words}: {said[-600:]}"
    return ""


def whole(path: Path) -> str:
    """What is wrong with a checkpoint that has to be there and good."""
    try:
        state = read_checkpoint(path)["state_dict"]
    except UserError as error:
        return str(error)
    return "" if all(value.isfinite().all() for value in state.values()) else f"{path.name} has numbers not finite"


# --------------------------------------------------------------------------------------------------------- killed
def killed(setting: str, lab: Lab, random: Random) -> str:
    """SIGKILL at any moment, in half of the cases twice; then the same command goes on to the end."""
    for _ in range(random.choice([1, 2])):
        commands = lab.go_on(setting)
        if random.random() < 0.9:
            lab.wait_for_steps(commands[0])
        time.sleep(random.uniform(0, 1.2 * lab.seconds(setting)))
        for command in random.sample(commands, len(commands)):
            command.kill()
            time.sleep(random.choice([0, 0, 0.1]))
    return lab.resumed(setting)


def killed_in_write(lab: Lab, random: Random) -> str:
    """SIGKILL at a byte of a checkpoint, or between the changes of names that follow it."""
    write = random.randrange(1, 9)  # two at a validation, and one before the first step

    def before() -> None:
        """Counts the writes down; kills within the chosen one."""
        save, change, left = torch.save, os.replace, [write]

        class Dying(io.FileIO):
            def write(self, data: Any) -> int:
                super().write(data[: random.randrange(len(data) + 1)])
                os.kill(os.getpid(), signal.SIGKILL)
                return 0

        def saved(checkpoint: Any, file: Any) -> None:
            left[0] -= 1
            save(checkpoint, Dying(file.name, "w") if left[0] == 0 and random.random() < 0.5 else file)

        def replaced(*names: Any) -> None:
            acts: list[Callable[[], None]] = [partial(change, *names), lambda: None]
            for act in random.sample(acts, 2):
                act()
                if left[0] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        torch.save, os.replace = saved, replaced  # type: ignore[assignment]

    (command,) = lab.fit("plain", before=before)
    if command.wait() != -signal.SIGKILL:
        return f"not killed: {command.said[-300:]}"
    if lab.last.exists() and (lost := whole(lab.last)):
        return lost
    return lab.resumed("plain")


def worker_dies(lab: Lab, random: Random) -> str:
    """One of two processes is killed: the other has to end with an error within a minute."""
    commands = lab.fit("processes")
    lab.wait_for_steps(commands[0])
    time.sleep(random.uniform(0, lab.seconds("processes")))
    victim = random.randrange(2)
    commands[victim].kill()
    code = commands[1 - victim].wait(60)
    if code is None:
        return f"process {1 - victim} hangs after the other died: {commands[1 - victim].said[-300:]}"
    if code == 0 and commands[victim].process.exitcode != 0 and not (lab.run / "metrics.json").exists():
        return "the process that was left ended as if nothing had happened"
    return lab.resumed("processes")


def signalled(lab: Lab, random: Random) -> str:
    """SIGINT or SIGTERM to one or both of two processes: saved within a step, exit code 128 + signal."""
    number = random.choice([signal.SIGINT, signal.SIGTERM])
    commands = lab.fit("processes")
    lab.wait_for_steps(commands[0])
    time.sleep(random.uniform(0.05, 0.6 * lab.seconds("processes")))
    for command in random.choice([commands, commands[:1], commands[1:]]):
        command.send(number)
    codes = [command.wait() for command in commands]
    if codes[0] == 0 and (lab.run / "metrics.json").exists():
        return lab.compared("processes")  # it was at its end
    if codes != [128 + number, 0] or f"{number.name} at step" not in commands[0].said:
        return f"exit codes {codes} for signal {number}: {commands[0].said[-300:]} {commands[1].said[-300:]}"
    return lab.resumed("processes")


def signalled_command(lab: Lab, random: Random) -> str:
    """The same from outside: Ctrl-C or SIGTERM for `python main.py fit` on two devices, which starts the second."""
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
        # Ctrl-C reaches all processes of a terminal, SIGTERM the one that it is sent to
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        try:
            said = process.communicate(timeout=60)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "hangs"
    if process.returncode != 128 + number:
        return f"exit code {process.returncode} for signal {number}: {said[-600:]}"
    step = read_checkpoint(lab.last)["global_step"]
    return "" if f"at step {step}: saved" in said else f"step {step} is saved, but: {said[-600:]}"


def requeued(lab: Lab, random: Random) -> str:
    """SLURM's signal before the end of a job's time: saved, queued again, and the job that comes then goes on."""
    scontrol = lab.folder / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(REQUEUED)
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "llmx"}
    slurm |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
    slurm["PATH"] = f"{scontrol.parent}:{os.environ['PATH']}"
    (command,) = lab.fit("dropout", environment=slurm)
    lab.wait_for_steps(command)
    time.sleep(random.uniform(0.05, 0.6 * lab.seconds("dropout")))
    command.send(signal.SIGUSR1)
    code = command.wait()
    if code == 0 and (lab.run / "metrics.json").exists():
        return lab.compared("dropout")
    asked = lab.folder / "requeued"
    if code != 128 + signal.SIGUSR1 or not asked.exists() or asked.read_text() != "requeue 77\n":
        return f"exit code {code}, not queued again: {command.said[-600:]}"
    if left := list(lab.folder.glob("hpc_ckpt*")):
        return f"{left} beside the run's own checkpoint"
    return ended(lab.go_on("dropout", environment=slurm)) or lab.compared("dropout")


# ---------------------------------------------------------------------------------------------------- disk and data
@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[str], Any]]:
    """A disk of some bytes at a folder. Raises Skipped where this user may not mount one."""
    folder.mkdir()
    options = f"size={size},mode=777"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"no small disk can be mounted: {done.stderr.strip()}")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def disk_full(lab: Lab, random: Random) -> str:
    """The disk of the runs fills up: one message, and with room again the run goes on."""
    needed = sum(path.stat().st_size for path in (lab.references / "plain").rglob("*") if path.is_file())
    with small_disk(lab.run.parent, int(random.uniform(0.05, 0.9) * needed) + 4096) as remount:
        (command,) = lab.fit("plain")
        code = command.wait()
        remount("size=100m")
        if code == 0:  # what did not fit was deleted in time
            return lab.compared("plain")
        return refused([command]) or (whole(lab.last) if lab.last.exists() else "") or lab.resumed("plain")


def small_files(lab: Lab, random: Random) -> str:
    """The disk is full for checkpoints: a limit on the size of a file stands for it, where no disk can be mounted."""
    size = (lab.references / "plain/checkpoints/last.ckpt").stat().st_size
    limit = random.randrange(size // 2, size)

    def before() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    if lost := refused(lab.fit("plain", before=before), "could not be written"):
        return lost
    if left := [*lab.run.glob("checkpoints/*partial*")]:
        return f"left behind: {left}"
    return lab.resumed("plain")


def read_only(lab: Lab, random: Random) -> str:
    """Data and cache can be read only: the run is the same. Runs cannot be written: one message."""
    disk = lab.folder / "disk"
    with small_disk(disk, 2**20) as remount:
        shutil.copy(lab.folder / "corpus.txt", disk)
        remount("ro")
        environment = {"LLMX_CACHE": str(disk / "cache")}
        data = ("--data.root", "disk", "--data.corpus", "disk/corpus.txt")
        lost = ended(lab.fit("plain", *data, environment=environment)) or lab.compared("plain")
        return lost or refused(lab.fit("plain", "--trainer.default_root_dir", "disk"), "disk")


def damaged_corpus(lab: Lab, random: Random) -> str:
    """A named corpus with a changed byte, or cut: one message with the file's name."""
    file = lab.folder / "data/tinyshakespeare/input.txt"
    file.parent.mkdir(parents=True)
    content = bytearray(TEXT.encode())
    at = random.randrange(len(content))
    file.write_bytes(random.choice([content[:at], content[:at] + b"~" + content[at + 1 :], content + b"\n"]))
    publish = partial(_publish, "http://127.0.0.1:9/", TEXT)
    return refused(lab.fit("plain", "--data.corpus", "tinyshakespeare", before=publish), str(file.name), "sha256")


def damaged_cache(lab: Lab, random: Random) -> str:
    """An encoded corpus with a changed byte, or cut: it is encoded again, and the run is the same."""
    cache = lab.folder / "cache/tokens"
    command = Command(lab.folder, call=_encode, environment={"LLMX_CACHE": str(cache.parent)})
    if lost := ended([command]):
        return lost
    (held,) = cache.glob("*.npy")
    held.write_bytes(_damaged(held.read_bytes(), random.choice(["cut", "flipped", "empty", "foreign"]), random))
    return ended(lab.fit("plain")) or lab.compared("plain")


def _encode() -> int:
    TextDataModule("corpus.txt").tokens("train")
    return 0


def cache_by_two(lab: Lab, random: Random) -> str:
    """Two processes encode a corpus at once, and one is killed: the others have the right tokens."""
    text = "".join(random.choices("abcdefgh \n", k=2_000_000))
    (lab.folder / "large.txt").write_text(text)
    expected = hashlib.sha256(np.frombuffer(text.encode(), np.uint8).tobytes()).hexdigest()

    def encode() -> int:
        data = TextDataModule("large.txt", tokenizer="byte", split=[1.0, 0.0, 0.0])
        digest = hashlib.sha256(np.asarray(data.tokens("train")).tobytes()).hexdigest()
        return int(digest != expected)

    environment = {"LLMX_CACHE": str(lab.folder / "cache")}
    first, second = (Command(lab.folder, call=encode, environment=environment) for _ in range(2))
    time.sleep(random.uniform(0, 0.1))
    first.kill()
    return ended([second]) or ended([Command(lab.folder, call=encode, environment=environment)])


def token_files(lab: Lab, random: Random) -> str:
    """Two processes write a folder of token files at once, and one is killed: it is whole or no corpus."""
    text = "".join(random.choices("abcdefgh \n", k=400_000))
    place = lab.folder / "tokens"
    pieces = [text[at : at + 1000] for at in range(0, len(text), 1000)]

    def write() -> int:
        try:
            write_tokens(place, pieces, ByteTokenizer(), file_tokens=50_000)
        except UserError:
            return 2
        return 0

    first, second = (Command(lab.folder, call=write) for _ in range(2))
    time.sleep(random.uniform(0, 0.05))
    first.kill()
    if second.wait() is None:
        return "hangs"
    if (place / "tokenizer.json").exists():
        held = np.asarray(open_tokens(str(place)).tokens)
        return "" if held.tobytes() == text.encode() else "a corpus that is not the text"
    lost = refused(lab.fit("plain", "--data.corpus", "tokens"), "tokens") if place.exists() else ""
    shutil.rmtree(place, ignore_errors=True)
    return lost or ("" if write() == 0 else "cannot be written again")


# -------------------------------------------------------------------------------------------------------- download
class Slow(http.server.BaseHTTPRequestHandler):
    """Serves the corpus in pieces; `cut` after some of them, `changed` with another byte."""

    fault = ""

    def do_GET(self) -> None:
        content = TEXT.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for at in range(0, len(content), 500):
            if self.fault == "cut" and at > len(content) // 2:
                return
            piece = content[at : at + 500]
            self.wfile.write(piece.upper() if self.fault == "changed" and at else piece)
            time.sleep(0.02)

    def log_message(self, *_: Any) -> None:
        pass


def _publish(url: str, text: str) -> None:
    """Makes tinyshakespeare a small text that is served at a place."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    corpora.PUBLISHED["tinyshakespeare"] = corpora.Published(url, digest)
    os.environ["LLMX_DATA_PATH"] = "nowhere"


def download(lab: Lab, random: Random) -> str:
    """A download is killed, cut off, or brings another text: no file takes its place, and the next one works."""
    fault = random.choice(["killed", "cut", "changed"])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Server", (Slow,), {"fault": fault}))
    publish = partial(_publish, f"http://127.0.0.1:{server.server_port}/", TEXT)

    def load() -> int:
        return int(corpora.load_corpus("tinyshakespeare").text != TEXT)

    environment = {"LLMX_CACHE": str(lab.folder / "cache")}
    named = ("--data.corpus", "tinyshakespeare")
    # forked before the server's threads begin: it answers once they do
    commands = lab.fit("plain", *named, before=publish) if fault != "killed" else []
    if fault == "killed":
        commands = [Command(lab.folder, call=load, environment=environment, before=publish)]
    again = threading.Thread(target=server.serve_forever, daemon=True)
    again.start()
    try:
        if fault == "killed":
            time.sleep(random.uniform(0.05, 0.4))
            commands[0].kill()
        elif lost := refused(commands, "downloaded" if fault == "cut" else "download"):
            return lost
        if (file := lab.folder / "cache/tinyshakespeare/input.txt").exists() and file.read_text() != TEXT:
            return "a file that is not the corpus"
    finally:
        server.shutdown()
        again.join()
    server.RequestHandlerClass = Slow
    after = Command(lab.folder, call=load, environment=environment, before=publish)
    again = threading.Thread(target=server.serve_forever, daemon=True)
    again.start()
    try:
        return ended([after])
    finally:
        server.shutdown()
        server.server_close()


# ----------------------------------------------------------------------------------------------------- checkpoints
def _damaged(content: bytes, kind: str, random: Random) -> bytes:
    at = random.randrange(1, len(content))
    match kind:
        case "cut":
            return content[:at]
        case "flipped":
            return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]
        case "empty":
            return b""
    foreign = io.BytesIO()
    torch.save(random.choice([{"weight": torch.zeros(3)}, [1, 2], torch.zeros(3), {"state_dict": {}}]), foreign)
    return random.choice([foreign.getvalue(), b"PK\x03\x04 no archive", b"GIF89a" + bytes(200), TEXT.encode()])


def damaged_checkpoint(kind: str, lab: Lab, random: Random) -> str:
    """A checkpoint that is cut, empty, another file, or has one bit changed: refused at every door, in one message.

    A bit that nothing reads may change: then the weights have to be the same.
    """
    shutil.copytree(lab.references / "plain", lab.run, symlinks=True)
    original = read_checkpoint(lab.last)["state_dict"]
    lab.last.resolve().write_bytes(_damaged(lab.last.read_bytes(), kind, random))
    try:
        held = read_checkpoint(lab.last)["state_dict"]
    except UserError:
        doors = [["validate"], ["predict"], ["fit"], ["fit", "--config", "plain.yaml"]]
        commands = [Command(lab.folder, [*door, "--ckpt_path", "last"]) for door in random.sample(doors, 2)]
        return next((lost for command in commands if (lost := refused([command], "ckpt_path"))), "")
    same = held.keys() == original.keys() and all(torch.equal(held[name], original[name]) for name in held)
    return "" if same else "other weights were read, and nothing said"


def flipped_weight(lab: Lab, random: Random) -> str:
    """One bit of one weight is changed: it has to be noticed."""
    shutil.copytree(lab.references / "plain", lab.run, symlinks=True)
    path = lab.last.resolve()
    with zipfile.ZipFile(path) as archive:
        weights = [member for member in archive.infolist() if "/data/" in member.filename]
        weight = archive.read(random.choice(weights))
    content = path.read_bytes()
    at = content.index(weight) + random.randrange(len(weight))
    path.write_bytes(content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :])
    door = random.choice(["fit", "validate", "predict"])
    return refused([Command(lab.folder, [door, "--ckpt_path", "last"])], "ckpt_path", "damaged")


# -------------------------------------------------------------------------------------------------------- not finite
def not_finite(setting: str, lab: Lab, random: Random) -> str:
    """A mixer of the user's gives NaN or infinity, or its gradient does, at some step: one message, the checkpoint
    before stays good, and without the fault the run goes on from there as if nothing had been."""
    illness = {
        "SICK_PROCESS": str(random.randrange(SETTINGS[setting]["trainer"].get("devices", 1))),
        "SICK_AT": str(random.randrange(1, 17)),
        "SICK_WITH": random.choice(["nan", "inf"]),
        "SICK_IN": random.choice(["forward", "backward"]),
    }
    commands = lab.fit(setting, environment=illness)
    return refused(commands, "training has diverged", "good checkpoint is") or whole(lab.last) or lab.resumed(setting)


# ------------------------------------------------------------------------------------------------------ all of them
@dataclass(frozen=True)
class Kind:
    """A kind of fault, and how often it is injected."""

    name: str
    count: int
    inject: Callable[[Lab, Random], str]


KINDS = [
    *(Kind(f"kill: {name}", 10, partial(killed, name)) for name in ("plain", "accumulation", "dropout", "epochs")),
    Kind("kill: 2 processes", 10, partial(killed, "processes")),
    Kind("kill: one of 2 processes", 6, worker_dies),
    Kind("kill: while a checkpoint is written", 14, killed_in_write),
    Kind("signal: 2 processes", 8, signalled),
    Kind("signal: python main.py on 2 devices", 3, signalled_command),
    Kind("signal: SLURM requeue", 4, requeued),
    Kind("disk full", 8, disk_full),
    Kind("disk full: checkpoints only", 5, small_files),
    Kind("read-only data, cache, runs", 3, read_only),
    Kind("download: killed, cut, changed", 12, download),
    Kind("cache: built by two, one killed", 10, cache_by_two),
    Kind("cache: damaged", 8, damaged_cache),
    Kind("token files: written by two, one killed", 10, token_files),
    Kind("corpus: damaged", 6, damaged_corpus),
    *(Kind(f"checkpoint: {kind}", 8, partial(damaged_checkpoint, kind)) for kind in ("cut", "flipped", "foreign")),
    Kind("checkpoint: empty", 3, partial(damaged_checkpoint, "empty")),
    Kind("checkpoint: a weight's bit flipped", 14, flipped_weight),
    Kind("NaN or infinity", 10, partial(not_finite, "sick")),
    Kind("NaN or infinity in one of 2 processes", 5, partial(not_finite, "sick processes")),
]


def _inject(kind: Kind, lab: Lab, seed: str) -> tuple[str, str | None, float]:
    """What was lost, why it was skipped, and seconds."""
    started = time.perf_counter()
    try:
        lost, skipped = kind.inject(lab.prepare(), Random(seed)), None
    except Skipped as reason:
        lost, skipped = "", str(reason)
    except Exception as error:  # the table has to be finished
        lost, skipped = f"{type(error).__name__}: {error}", None
    shutil.rmtree(lab.folder, ignore_errors=True)
    return lost, skipped, time.perf_counter() - started


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="the kinds whose names begin so")
    options.add_argument("--count", type=int, help="faults of each kind")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--jobs", type=int, default=2, help="faults at a time")
    options.add_argument("--out", type=Path, help="JSON file for the result")
    chosen = options.parse_args()
    kinds = [replace(kind, count=chosen.count or kind.count) for kind in KINDS if kind.name.startswith(chosen.only)]
    if not kinds:
        options.error(f"--only: no kind begins with {chosen.only!r}; there are {', '.join(k.name for k in KINDS)}")
    torch.set_num_threads(1)
    started = time.perf_counter()
    outcomes: dict[str, list[tuple[str, str | None, float]]] = {kind.name: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        _references(root)
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(chosen.jobs, context) as pool, Progress(console=Console(stderr=True)) as progress:
            waiting = {}
            for kind in kinds:
                for number in range(kind.count):
                    lab = Lab(root / f"{kinds.index(kind)}-{number}", root / "references")
                    waiting[pool.submit(_inject, kind, lab, f"{chosen.seed} {kind.name} {number}")] = kind, number
            task = progress.add_task("faults", total=len(waiting))
            for future in as_completed(waiting):
                kind, number = waiting[future]
                outcomes[kind.name].append(future.result())
                if future.result()[0]:
                    progress.console.print(f"[red]{kind.name} {number}[/red]: {future.result()[0]}", markup=True)
                progress.advance(task)
    return _finish(outcomes, chosen, time.perf_counter() - started)


def _references(root: Path) -> None:
    lab = Lab(root / "first", root / "references").prepare()
    lab.references.mkdir()
    llmx.cli.execute(["fit", "--config", str(lab.folder / "plain.yaml")], dry=True)  # imports what all forks need
    for setting in SETTINGS:
        if lost := ended(lab.fit(setting)):
            raise RuntimeError(f"the undisturbed run of {setting}: {lost}")
        lab.run.rename(lab.references / setting)


def _finish(outcomes: dict[str, list[tuple[str, str | None, float]]], chosen: Any, seconds: float) -> int:
    from llmx.runs.provenance import provenance

    table = Table("fault", "injected", "skipped", "lost something", title="what faults cost")
    rows: list[dict[str, Any]] = []
    for name, results in outcomes.items():
        skipped = [reason for _, reason, _ in results if reason is not None]
        lost = [what for what, _, _ in results if what]
        rows.append({"fault": name, "injected": len(results) - len(skipped), "lost": lost, "skipped": skipped[:1]})
        table.add_row(name, str(len(results) - len(skipped)), str(len(skipped)), str(len(lost)))
    sums = {"injected": sum(row["injected"] for row in rows), "lost": sum(len(row["lost"]) for row in rows)}
    table.add_row("all", str(sums["injected"]), "", str(sums["lost"]))
    Console().print(table)
    if chosen.out is not None:
        record = {"date": date.today().isoformat(), **provenance(), "seed": chosen.seed, "seconds": round(seconds)}
        chosen.out.write_text(json.dumps({**record, **sums, "faults": rows}, indent=2) + "\n")
    return int(sums["lost"] > 0)


if __name__ == "__main__":
    sys.exit(main())
