"""Two nodes on one machine: training over two network namespaces, a node that dies, a cable that is pulled.

Both times the run resumes on one node, with one or two processes, and has to end where an uninterrupted run ends. Each
namespace has its own address and network stack, and reaches the other only through a veth pair. They share the folder
of the runs, as a cluster does. It needs Linux, root and iproute2, and takes three to six minutes. It always removes the
namespaces and the cable.

    python -m benchmarks.robustness.two_nodes --out docs/results/two_nodes.json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from benchmarks.harness import CHECKOUT

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29400
STEPS, CHECKPOINT = 400, 100
SILENCE = 30  # seconds after which a process that receives nothing gives up
BOUND = 60  # seconds within which a node has to stop after the other is lost
PATIENCE = 240  # seconds for everything else
TOLERANCE = 1e-4  # of losses after 400 steps: one and two processes sum fp32 in different orders

CONFIG = {
    "seed_everything": 3,
    "trainer": {
        "max_steps": STEPS,
        "val_check_interval": CHECKPOINT,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "accelerator": "cpu",
        "precision": "32-true",
    },
    "model": {
        "network": {
            "class_path": "Decoder",
            "init_args": {
                "dim": 32,
                "depth": 2,
                "block": {
                    "class_path": "PreNormBlock",
                    "init_args": {
                        "mixer": {"class_path": "Attention", "init_args": {"heads": 2}},
                        "feed_forward": {"class_path": "SwiGLU", "init_args": {"hidden": 64}},
                    },
                },
            },
        }
    },
    "data": {"corpus": "stdlib", "window": 32, "batch_size": 8, "split": [0.9, 0.001, 0.099]},
}
DDP = ["--trainer.strategy=DDPStrategy", f"--trainer.strategy.timeout=0:00:{SILENCE}"]


@dataclass(frozen=True)
class Node:
    """A network namespace, its end of the cable, and its address."""

    namespace: str
    cable: str
    address: str

    def start(self, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts a process on the node."""
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": self.cable, "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(CHECKOUT)}
        with (folder / f"{self.cable}.log").open("ab") as log:
            command = ["ip", "netns", "exec", self.namespace, *arguments]
            return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """Kills all processes of the node at once."""
        for pid in ip("netns", "pids", self.namespace).split():
            os.kill(int(pid), signal.SIGKILL)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10).stdout


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two namespaces joined by a cable. At the end they are deleted and their processes killed."""
    name = f"llmx{os.getpid()}"
    a, b = (Node(name + end, f"veth{end}{os.getpid()}", ip4) for end, ip4 in zip("ab", ADDRESSES, strict=True))
    made = []
    try:
        for node in (a, b):
            ip("netns", "add", node.namespace)
            made.append(node)
        ip("link", "add", a.cable, "netns", a.namespace, "type", "veth", "peer", b.cable, "netns", b.namespace)
        for node in (a, b):
            ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", node.cable)
            for device in ("lo", node.cable):
                ip("-n", node.namespace, "link", "set", device, "up")
        yield a, b
    finally:
        for node in made:
            node.kill()
            ip("netns", "delete", node.namespace)


def finished(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit code of a process that must end within so many seconds."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired as error:
        raise SystemExit(f"after {seconds:.0f} seconds {error.cmd} is still running") from None


def fit(folder: Path, *options: str) -> list[str]:
    return [str(CHECKOUT / "main.py"), "fit", f"--trainer.default_root_dir={folder}", *options]


def interrupted(nodes: tuple[Node, Node], folder: Path, how: str) -> dict[str, float]:
    """Trains on both nodes until there is a checkpoint, then loses one node.

    Returns address -> seconds until the remaining node stopped.
    """
    a, b = nodes
    options = ["--config=config.yaml", "--trainer.num_nodes=2", "--trainer.devices=1", *DDP]
    started = {}
    for node in nodes:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={a.address}:{PORT}", f"--rdzv-id={how}"]
        torchrun += ["--max-restarts=0", f"--local-addr={node.address}", f"--rdzv-conf=is_host={int(node is a)}"]
        started[node] = node.start(folder, *torchrun, *fit(folder, *options))
    deadline = time.monotonic() + PATIENCE
    while not list(folder.glob("lightning_logs/*/checkpoints/last.ckpt")):
        if time.monotonic() > deadline or any(process.poll() is not None for process in started.values()):
            raise SystemExit("no checkpoint was written")
        time.sleep(0.05)
    # wait for the training processes: torchrun, cut off from its rendezvous, may outlive them by minutes
    workers = {node: children(process.pid) for node, process in started.items()}
    lost = time.monotonic()
    if how == "killed":
        b.kill()
        del workers[b]
    else:
        ip("-n", b.namespace, "link", "set", b.cable, "down")
    seconds = {}
    for node, pids in workers.items():
        while any(map(running, pids)):
            if time.monotonic() > lost + BOUND:
                raise SystemExit(f"{node.address} still trains after {BOUND} seconds")
            time.sleep(0.05)
        seconds[node.address] = round(time.monotonic() - lost, 1)
    if list(folder.glob("lightning_logs/*/metrics.json")):
        raise SystemExit("the training ended as if nothing had happened")
    for node, process in started.items():
        node.kill()
        process.wait(PATIENCE)
    return seconds


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def running(pid: str) -> bool:
    """Whether a process is still running; an ended process that nobody waited for is a zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def resumed(node: Node, folder: Path, processes: int) -> None:
    """Resumes from the last checkpoint on one node."""
    options = ["--ckpt_path=last", "--trainer.num_nodes=1", f"--trainer.devices={processes}", *DDP]
    if finished(node.start(folder, sys.executable, *fit(folder, *options)), PATIENCE):
        raise SystemExit("resuming failed")


def losses(folder: Path) -> dict[str, dict[int, float]]:
    """tag -> step -> value in the run's curves."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = folder.glob("lightning_logs/version_*")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in ("train/loss", "val/loss")}


def largest_difference(a: dict[int, float], b: dict[int, float]) -> float:
    """The largest difference of two curves, which must have the same steps."""
    if a.keys() != b.keys():
        raise SystemExit(f"{len(a.keys() ^ b.keys())} steps are in one curve alone")
    return max(abs(a[step] - b[step]) for step in a)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    out = parser.parse_args().out
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    result: dict[str, object] = {"date": date.today().isoformat(), "steps": STEPS, "tolerance": TOLERANCE}
    holds = True
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, two_nodes() as nodes:
        curves = {}
        for how, processes in {"never": 1, "killed": 1, "unplugged": 2}.items():
            folder = Path(temporary, how)
            folder.mkdir()
            (folder / "config.yaml").write_text(json.dumps(CONFIG))  # JSON is YAML
            try:
                if how == "never":
                    node, options = nodes[0], ["--config=config.yaml"]
                    if finished(node.start(folder, sys.executable, *fit(folder, *options)), PATIENCE):
                        raise SystemExit("the training on one process failed")
                else:
                    stopped = interrupted(nodes, folder, how)
                    ip("-n", nodes[1].namespace, "link", "set", nodes[1].cable, "up")
                    resumed(nodes[0], folder, processes)
            except SystemExit:
                for log in folder.glob("*.log"):
                    sys.stderr.write(f"--- {log.name}\n{log.read_text()[-4000:]}\n")
                raise
            curves[how] = losses(folder)
            if how == "never":
                continue
            difference = {tag: largest_difference(curves[how][tag], curves["never"][tag]) for tag in curves["never"]}
            holds &= max(difference.values()) <= TOLERANCE
            result[how] = {"stopped_after_seconds": stopped, "resumed_on_processes": processes, "apart": difference}
            print(how, json.dumps(result[how]), flush=True)
    result |= {"holds": holds, "seconds": round(time.monotonic() - started)}
    print(json.dumps(result, indent=2))
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
