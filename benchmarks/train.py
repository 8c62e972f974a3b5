"""Training throughput: ours end to end (`main.py fit`), ours in a bare loop, and peers in the same loop.

The ratio of the first two says what Lightning, the data and logging cost. The bare loop is the same for all: one batch,
fused AdamW (3e-3, weight decay 0.01 on matrices), gradients clipped to norm 1, the same loss.

    python -m benchmarks.train --out docs/results/train.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.device import DEVICE, now
from benchmarks.harness import (
    Case,
    Contender,
    Measure,
    Result,
    finish,
    measure_in_turns,
    parser,
    run,
    use_threads,
)
from benchmarks.peers import PEERS, SETTINGS, Peer, Shape, mean_loss, ours
from llmx.training.hardware import fast_precision, keep_freed_memory

UNTIMED_STEPS = 2  # at the start of every turn, while the caches still hold the previous contender's data
GEMM_SIZE, GEMMS = (8192, 10) if DEVICE.type == "cuda" else (2048, 1)  # products between two readings of the clock
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


@dataclass(frozen=True)
class Mode:
    precision: str  # Lightning's name: 32-true or bf16-mixed
    compile: bool

    def __str__(self) -> str:
        return f"{'fp32' if self.precision == '32-true' else 'bf16'} {'compiled' if self.compile else 'eager'}"


def prepare_loop(build: Callable[[Shape], nn.Module], shape: Shape, mode: Mode, steps: int) -> Measure:
    """Prepares a plain training loop; the returned function measures tokens per second over `steps` steps."""
    if build is ours:
        keep_freed_memory()  # as `fit` does; peers run as their users run them
    torch.manual_seed(0)
    network = build(shape).to(DEVICE).train()
    parameters = list(network.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=3e-3, weight_decay=0.01, fused=True)
    tokens = torch.randint(shape.vocab_size, (shape.batch_size, shape.window + 1), device=DEVICE)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    loss_of = torch.compile(mean_loss, dynamic=False) if mode.compile else mean_loss

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=mode.precision == "bf16-mixed"):
            loss = loss_of(network, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    def measure(case: Case) -> float:
        for _ in range(UNTIMED_STEPS):
            step()
        start = now()
        for _ in range(steps):
            step()
        return steps * inputs.numel() / (now() - start)

    return measure


def prepare_fit(shape: Shape, mode: Mode, steps: int) -> Measure:
    """`main.py fit` with the default logging, clipping and audit; its own scalars give tokens per second."""
    return partial(_fit, shape, mode, steps)


def _fit(shape: Shape, mode: Mode, steps: int, case: Case) -> float:
    from tensorboard.backend.event_processing import event_accumulator

    settings = {
        "trainer.max_steps": 2 * steps,
        "trainer.log_every_n_steps": steps,  # so the first scalar is the warm-up, the second the measurement
        "trainer.val_check_interval": 2 * steps,
        "trainer.limit_val_batches": 1,
        "trainer.precision": mode.precision,
        "model.compile": mode.compile,
        "model.network.dim": shape.dim,
        "model.network.depth": shape.depth,
        "model.network.block.mixer.heads": shape.heads,
        "model.network.block.feed_forward.hidden": shape.hidden,
        "data.window": shape.window,
        "data.batch_size": shape.batch_size,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "main.py", "fit", "--config", "configs/transformer.yaml"]
        run(
            [*command, f"--trainer.default_root_dir={folder}", *(f"--{key}={value}" for key, value in settings.items())]
        )
        events = event_accumulator.EventAccumulator(f"{folder}/lightning_logs/version_0").Reload()
        _, measured = events.Scalars("train/tokens_per_second")
    return measured.value


def prepare_gemm(precision: str) -> Measure:
    """FLOP/s of large square matrix products: the most that the machine can do."""
    left, right = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=DEVICE).to(DTYPES[precision]) for _ in range(2))

    def measure(case: Case) -> float:
        seconds = []
        for _ in range(5):
            start = now()
            for _ in range(GEMMS):
                left @ right
            seconds.append((now() - start) / GEMMS)
        return 2 * GEMM_SIZE**3 / median(seconds)

    return measure


def flops_per_token(build: Callable[[Shape], nn.Module], shape: Shape) -> float:
    """Matrix product FLOPs of one forward and backward pass, on the CPU. Attention counts as the full square."""
    network = build(shape)
    tokens = torch.zeros(1, shape.window, dtype=torch.int64)
    # the counter does not count CPU attention kernels, and on the meta device transformers cannot read its positions
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mean_loss(network, tokens, tokens).backward()
    return counter.get_total_flops() / tokens.numel()


def modes(quick: bool) -> list[Mode]:
    """The modes of each peer: bf16 only if the machine multiplies it, because emulated bf16 is many times slower."""
    precisions = dict.fromkeys(("32-true", fast_precision("auto")))
    return [Mode(precision, compile) for precision in precisions for compile in ((False,) if quick else (False, True))]


def compare(setting: str, peers: list[Peer], mode: Mode, options: argparse.Namespace) -> list[Result]:
    """Measures one setting: ours first, then the loops, each with its fraction of the roof."""
    shape = SETTINGS[setting]
    steps = options.steps
    runs: list[tuple[Contender, Callable[[Shape], nn.Module]]] = []

    def add(
        name: str, build: Callable[[Shape], nn.Module], how: Mode, attention: str, prepare: Callable[[], Measure]
    ) -> None:
        flags = {"precision": how.precision, "compile": how.compile, "attention": attention, "optimizer": "fused AdamW"}
        runs.append((Contender(f"{name}, {how}", prepare, flags), build))

    add("llmx fit", ours, mode, "by dtype and window", partial(prepare_fit, shape, mode, steps))
    add("llmx bare loop", ours, mode, "by dtype and window", partial(prepare_loop, ours, shape, mode, steps))
    for peer in peers:
        for how in modes(options.quick):
            add(peer.name, peer.build, how, peer.attention, partial(prepare_loop, peer.build, shape, how, steps))
    roofs = [Contender(precision, partial(prepare_gemm, precision)) for precision in DTYPES]
    everyone = [*(contender for contender, _ in runs), *roofs]
    results = measure_in_turns(everyone, [Case(setting)], options.repeats)
    roof = {result.contender: result.values for result in results[len(runs) :]}
    # counted last: memory that this process holds when it starts another one counts towards the other's peak
    for result, (contender, build) in zip(results[: len(runs)], runs, strict=True):
        if result.error is None:
            flops = flops_per_token(build, shape)
            best = roof[contender.flags["precision"]]
            result.flags = {**result.flags, "flops_per_token": flops}
            result.roof_fraction = [flops * rate / most for rate, most in zip(result.values, best, strict=True)]
    return results[: len(runs)]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--settings", default="founding,large", help=f"some of {', '.join(SETTINGS)}")
    options.add_argument("--peers", default=",".join(PEERS), help=f"some of {', '.join(PEERS)}")
    options.add_argument("--steps", type=int, default=50, help="training steps a round")
    options.add_argument("--precision", choices=DTYPES, help="precision of ours (default: that of a plain fit)")
    options.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile ours")
    options.add_argument("--quick", action="store_true", help="leave out the compiled peers")
    chosen = options.parse_args()
    choices = {"settings": list(SETTINGS), "peers": list(PEERS)}
    for key, known in choices.items():
        names = [name for name in getattr(chosen, key).split(",") if name]
        if unknown := [name for name in names if name not in known]:
            options.error(f"--{key}: there is no {unknown[0]!r}; choose from {', '.join(known)}")
        setattr(chosen, key, names)
    use_threads(chosen.threads)
    chosen.precision = chosen.precision or fast_precision("auto")
    mode = Mode(chosen.precision, chosen.compile)
    peers = [PEERS[name] for name in chosen.peers]
    results = [result for setting in chosen.settings for result in compare(setting, peers, mode, chosen)]
    return finish("training throughput", results, chosen)


if __name__ == "__main__":
    sys.exit(main())
