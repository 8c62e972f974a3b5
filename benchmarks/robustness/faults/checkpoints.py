"""Faults in a finished checkpoint: cut, empty, foreign, or with one bit flipped."""

from __future__ import annotations

import io
import shutil
import zipfile
from random import Random

import torch

from benchmarks.robustness.faults.laboratory import FaultLaboratory, wrong_refusal
from llmx.errors import UserError
from llmx.runs.archive import read_checkpoint
from testbed.forked import ForkedProcess
from testbed.tiny import TEXT


def damaged(content: bytes, kind: str, random: Random) -> bytes:
    """The content of a file after it was cut, flipped (one bit), emptied or replaced by a foreign file."""
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


def damaged_checkpoint(kind: str, lab: FaultLaboratory, random: Random) -> str:
    """A damaged checkpoint is refused by every command, in one message.

    A bit that nothing reads may flip: then the weights have to be the same.
    """
    shutil.copytree(lab.references / "plain", lab.run, symlinks=True)
    original = read_checkpoint(lab.last)["state_dict"]
    lab.last.resolve().write_bytes(damaged(lab.last.read_bytes(), kind, random))
    try:
        held = read_checkpoint(lab.last)["state_dict"]
    except UserError:
        commands = [["validate"], ["predict"], ["fit"], ["fit", "--config", "plain.yaml"]]
        chosen = random.sample(commands, 2)
        processes = [ForkedProcess(lab.folder, [*command, "--ckpt_path", "last"]) for command in chosen]
        return next((lost for process in processes if (lost := wrong_refusal([process], "ckpt_path"))), "")
    same = held.keys() == original.keys() and all(torch.equal(held[name], original[name]) for name in held)
    return "" if same else "other weights were read without a message"


def flipped_weight(lab: FaultLaboratory, random: Random) -> str:
    """One bit of one weight flips. Every command has to notice it."""
    shutil.copytree(lab.references / "plain", lab.run, symlinks=True)
    path = lab.last.resolve()
    with zipfile.ZipFile(path) as archive:
        weights = [member for member in archive.infolist() if "/data/" in member.filename]
        weight = archive.read(random.choice(weights))
    content = path.read_bytes()
    at = content.index(weight) + random.randrange(len(weight))
    path.write_bytes(content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :])
    verb = random.choice(["fit", "validate", "predict"])
    return wrong_refusal([ForkedProcess(lab.folder, [verb, "--ckpt_path", "last"])], "ckpt_path", "damaged")
