"""Our recurrences against the kernels of flash-linear-attention, on a CUDA device: outputs and gradients.

Both get the same numbers, in float32 (where the kernels multiply in TF32) and in bfloat16. Log decays and rates stay
float32. The program prints |ours - theirs| / |exact| and, in brackets, |ours - exact| / |exact|. Exact is ours in
float64.

    pip install flash-linear-attention
    python -m benchmarks.fla_parity --out docs/results/speed/fla_parity.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.device import DEVICE
from benchmarks.harness import conditions
from llmx.mixers.rwkv7 import FASTEST
from llmx.parts.delta import delta_rule, l2_norm, vector_delta_rule
from llmx.parts.dplr import dplr
from llmx.parts.linear_attention import scalar_decay, vector_decay

ROWS, TIME, HEADS, WIDTH = 2, 300, 2, 64
SCALE = WIDTH**-0.5  # scale of the queries: the kernels apply it by default, our recurrences do not
EXACT = ("g", "beta")  # these inputs stay float32

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Recurrence:
    """One recurrence in both libraries, as functions of the inputs that `draw` makes."""

    draw: Callable[[], dict[str, Tensor]]
    ours: Callable[[Inputs], Tensor]
    theirs: Callable[[Inputs], Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(ROWS, TIME, HEADS, *shape, dtype=torch.float64)


def plain() -> dict[str, Tensor]:
    return {name: normal(WIDTH) for name in "qkv"}


def scalar() -> dict[str, Tensor]:
    return {**plain(), "g": -F.softplus(normal() - 2)}


def gates() -> dict[str, Tensor]:
    return {**plain(), "g": F.logsigmoid(normal(WIDTH)) / 16}


def tied_gates() -> dict[str, Tensor]:
    """The key is one minus the decay, as in HGRN2."""
    g = F.logsigmoid(normal(WIDTH) + 2)
    return {**plain(), "k": 1 - g.exp(), "g": g}


def rates() -> dict[str, Tensor]:
    return {"q": l2_norm(normal(WIDTH)), "k": l2_norm(normal(WIDTH)), "v": normal(WIDTH), "beta": normal().sigmoid()}


def rwkv() -> dict[str, Tensor]:
    erased, rate = l2_norm(normal(WIDTH)), normal(WIDTH).sigmoid()
    return {**plain(), "g": FASTEST * normal(WIDTH).sigmoid(), "read": -erased, "write": erased * rate}


def no_decay(x: Inputs) -> Tensor:
    return x["v"].new_zeros(1, TIME, HEADS)


def retention_decay(x: Inputs) -> Tensor:
    """The decay of llmx/mixers/retnet.py."""
    exact = torch.promote_types(x["v"].dtype, torch.float32)
    heads = torch.arange(HEADS, device=x["v"].device, dtype=exact)
    return torch.log1p(-torch.exp2(-5 - heads)).expand(1, TIME, -1)


def kernel(module: str, *names: str, **options: Any) -> Callable[[Inputs], Tensor]:
    """The function chunk_`module` of fla.ops; `names` are our names of its arguments, in its order."""

    def call(x: Inputs) -> Tensor:
        function = getattr(import_module(f"fla.ops.{module}"), f"chunk_{module}")
        return function(*(x[name] for name in names), **options)[0]

    return call


RECURRENCES = {
    "linear_attention": Recurrence(
        plain,
        lambda x: scalar_decay(SCALE * x["q"], x["k"], x["v"], no_decay(x))[0],
        kernel("linear_attn", *"qkv", normalize=False),
    ),
    "retnet": Recurrence(
        plain,
        lambda x: scalar_decay(SCALE * x["q"], x["k"], x["v"], retention_decay(x))[0],
        kernel("retention", *"qkv"),
    ),
    "scalar decay (mamba2, lightning)": Recurrence(
        scalar,
        lambda x: scalar_decay(SCALE * x["q"], x["k"], x["v"], x["g"])[0],
        kernel("simple_gla", *"qkvg"),
    ),
    "gla": Recurrence(
        gates,
        lambda x: vector_decay(SCALE * x["q"], x["k"], x["v"], x["g"])[0],
        kernel("gla", *"qkvg"),
    ),
    "hgrn2": Recurrence(
        tied_gates,
        lambda x: vector_decay(x["q"], x["k"], x["v"], x["g"])[0],
        kernel("gla", *"qkvg", scale=1.0),
    ),
    "deltanet": Recurrence(
        rates,
        lambda x: delta_rule(SCALE * x["q"], x["k"], x["v"], x["beta"])[0],
        kernel("delta_rule", *"qkv", "beta"),
    ),
    "gated_deltanet": Recurrence(
        lambda: {**rates(), "g": -F.softplus(normal() - 2)},
        lambda x: delta_rule(SCALE * x["q"], x["k"], x["v"], x["beta"], x["g"])[0],
        kernel("gated_delta_rule", *"qkvg", "beta"),
    ),
    "kda": Recurrence(
        lambda: {**rates(), "g": -F.softplus(normal(WIDTH) - 2)},
        lambda x: vector_delta_rule(SCALE * x["q"], x["k"], x["v"], x["beta"], x["g"])[0],
        kernel("kda", *"qkvg", "beta"),
    ),
    "rwkv7": Recurrence(
        rwkv,
        lambda x: dplr(x["q"], x["k"], x["v"], x["g"], x["read"], x["write"], FASTEST)[0],
        kernel("rwkv7", "q", "g", "k", "v", "read", "write"),
    ),
}


def compare(recurrence: Recurrence, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Relative errors of the output o and of every input's gradient: ours against theirs, and ours against exact."""
    torch.manual_seed(0)
    drawn = {name: x.to(torch.float32 if name in EXACT else dtype) for name, x in recurrence.draw().items()}
    weight = normal(WIDTH).to(dtype)  # the loss is its product with the output

    def results(form: Callable[[Inputs], Tensor], exact: bool) -> dict[str, Tensor]:
        inputs = {name: x.to(DEVICE, torch.float64 if exact else x.dtype).requires_grad_() for name, x in drawn.items()}
        output = form(inputs)
        gradients = torch.autograd.grad(output, list(inputs.values()), weight.to(output))
        named = zip(inputs, gradients, strict=True)
        return {"o": output.detach().double(), **{f"d{name}": gradient.double() for name, gradient in named}}

    true = results(recurrence.ours, exact=True)
    ours, theirs = results(recurrence.ours, exact=False), results(recurrence.theirs, exact=False)
    return {
        name: {
            "ours_theirs": float((ours[name] - theirs[name]).norm() / value.norm()),
            "ours_exact": float((ours[name] - value).norm() / value.norm()),
        }
        for name, value in true.items()
    }


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, help="JSON file for all errors")
    chosen = options.parse_args()
    rows: list[dict[str, Any]] = []
    for name, recurrence in RECURRENCES.items():
        for dtype in (torch.float32, torch.bfloat16):
            row: dict[str, Any] = {"recurrence": name, "dtype": str(dtype).removeprefix("torch.")}
            try:
                row["errors"] = compare(recurrence, dtype)
                line = "  ".join(
                    f"{value} {error['ours_theirs']:.1e} ({error['ours_exact']:.0e})"
                    for value, error in row["errors"].items()
                )
            except Exception as error:  # a failing kernel becomes a line
                row["error"] = line = f"{type(error).__name__}: {error}".strip()
            print(f"{name}, {row['dtype']}: {line}", flush=True)
            rows.append(row)
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(
            json.dumps({"benchmark": "parity with fla", **conditions(), "results": rows}, indent=2) + "\n"
        )
    return int(all("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
