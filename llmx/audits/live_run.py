"""The causality audit of a network as it runs: its own weights, precision and device, the whole window, text.

It works on the loss, the number that is believed: the end of a window of text is replaced, and no loss before may
change. Seen so are branches for 16 bits or for a GPU, what a long window alone shows, and what opens in training.

Rounding is told from a leak so: rows of one shape are rounded alike, so that mostly nothing changes at all. Where
something does (Fourier transforms; experts, whose products are as long as there are tokens for them), the row that
changed most is looked at in float64. What is not to be seen there is a leak of this precision alone if it is large and
at many positions, as a mask that is missing is; a choice that rounding has turned is at few.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from llmx.audits.causality_report import Breach
from llmx.audits.copies import copy_network, exact_copy, perturbed_copy, preserve_rng_state, seed_cpu
from llmx.audits.trials import CAST_TOLERANCE, LEAST, MAX_ROWS, MAX_WORK, Casts, change_of, seams, windows
from llmx.protocol import Losses, Network, Tokens

TOLERANCE = 1e-5  # relative to the largest loss: below, nothing is looked at again
EXACT_TOLERANCE = 1e-7  # in float64, where Fourier transforms leave 1e-15, and casts to float32 3e-8 of a loss
MANY = 0.1  # of the positions


def audit_live_run(
    network: Network,
    window: int,
    autocast: AbstractContextManager,
    text: Tensor | None = None,
    device: torch.device | str = "cpu",
    perturb: bool = False,
    tokens: int = 8192,
    seed: int = 0,
) -> Breach | None:
    """Looks for losses that depend on later text, in evaluation mode.

    The network and the caller's random state stay as they are.

    Args:
        network: whole.
        window: the length tried, two rows at least.
        autocast: what the run computes in.
        text: token ids (L,); random ones if not given.
        device: where it is run.
        perturb: move the weights first: what starts at zero hides what is behind it.
        tokens: the most in one pass, less where the network is large.
        seed: of rows, cuts and weights.

    Returns:
        The largest change that is no rounding.
    """
    if window < 2 or network.vocab_size < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    if text is None or len(text) <= window:
        text = torch.randint(network.vocab_size, (4 * window + 1,), generator=generator)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    rows = max(2, min(MAX_ROWS, min(tokens, int(4 * MAX_WORK / max(parameters, 1))) // window))
    some = torch.randint(1, window, (rows - rows // 2,), generator=generator)
    cuts = torch.cat((some, torch.tensor(seams(window, rows // 2))))[:, None]  # (R, 1)
    own, other = (windows(text, rows, window + 1, generator) for _ in range(2))
    positions = torch.arange(window + 1)
    inputs, targets = own[:, :-1], own[:, 1:]
    changed = torch.where(positions >= cuts, other, own)[:, :-1]
    new_targets = torch.where(positions > cuts, other, own)[:, 1:]  # the last before the cut stands there
    with preserve_rng_state(), torch.no_grad():
        if perturb:
            network = perturbed_copy(network, 0.1, generator)
        if any(tensor.device != torch.device(device) for tensor in (*network.parameters(), *network.buffers())):
            network = copy_network(network).to(device)  # to moves shared parameters in place
        with autocast:
            before = _losses(network, inputs, targets, device)
            after = _losses(network, changed, new_targets, device)
        if not before.isfinite().all():
            return None  # training has diverged, which others say
        earlier = positions[:-1] < cuts  # (R, T)
        change = _change(before, after).masked_fill(~earlier, 0.0)
        row = int(change.amax(1).argmax())
        if change[row].max() <= TOLERANCE:
            return None
        exact = exact_copy(network)
        one = slice(row, row + 1)
        with Casts() as casts:
            before = _losses(exact, inputs[one], targets[one], "cpu")
            after = _losses(exact, changed[one], new_targets[one], "cpu")
        exact_change = _change(before, after)[0].masked_fill(~earlier[row], 0.0)
        if exact_change.max() > max(EXACT_TOLERANCE, casts.tolerance):
            return _breach(network, window, exact_change, int(cuts[row]))
        large = CAST_TOLERANCE[torch.bfloat16]
        if ((change > large).sum(1) > MANY * earlier.sum(1)).any():
            return _breach(network, window, change[row], int(cuts[row]))
    return None


def _losses(network: Network, tokens: Tokens, targets: Tokens, device: torch.device | str) -> Losses:
    """Of a copy in evaluation mode that shares the parameters; on the CPU."""
    network = copy_network(network, share_parameters=True).eval()
    seed_cpu(0)
    return network.losses(tokens.to(device), targets.to(device))[0].double().cpu()


def _change(first: Tensor, second: Tensor) -> Tensor:
    """Relative to the largest loss; inf where only one of the two is a number."""
    return change_of(first.clamp(max=-LEAST), second.clamp(max=-LEAST))


def _breach(network: Network, window: int, change: Tensor, cut: int) -> Breach:
    name = type(network).__name__
    return Breach("run", "eval", window, name, name, int(change.argmax()), cut, change.max().item())
