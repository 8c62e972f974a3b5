"""The causality audit of a live run: its own weights, precision and device, the whole window, text.

It looks at the loss, the number that people believe: it replaces the end of a window of text, and no loss before may
change. So it finds branches for 16 bits or for a GPU, leaks that only a long window shows, and leaks that open in
training.

It tells rounding from a leak as follows. Rows of one shape round alike, so mostly nothing changes at all. Fourier
transforms and experts are exceptions: an expert's matrix product is as long as its number of tokens. There it repeats
the row that changed most in float64. A change that float64 does not show is a leak of this precision only if it is
large and at many positions, as with a missing mask. A choice that rounding turns shows at few positions.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from llmx.audits.causality_report import Breach
from llmx.audits.inputs import MAX_ROWS, MAX_WORK, chunk_boundaries, random_windows, token_budget
from llmx.audits.network_copies import copy_network, exact_copy, perturbed_copy, preserve_rng_state, seed_cpu
from llmx.audits.rounding import CAST_TOLERANCE, MIN_LOG_PROBABILITY, RoundingWatch, relative_change
from llmx.protocol import Losses, Network

TOLERANCE = 1e-5  # relative to the largest loss: smaller changes are not looked at again
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
    """Looks for losses that depend on later text, in evaluation mode. Returns the largest change that is not rounding.

    The network, whole and not sharded, and the caller's random state stay as they are. The audit tries sequences as
    long as the window, two at least, with the run's precision (`autocast`) and device. `text` has token ids (L,),
    random ones if not given. `perturb` moves the weights first, because a projection that starts at zero hides any leak
    behind it. One pass has at most `tokens`; a large network gets fewer. `seed` seeds rows, cuts and weights.
    """
    if window < 2 or network.vocab_size < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    if text is None or len(text) <= window:
        text = torch.randint(network.vocab_size, (4 * window + 1,), generator=generator)
    rows = max(2, min(MAX_ROWS, token_budget(network, tokens, 4 * MAX_WORK) // window))
    some = torch.randint(1, window, (rows - rows // 2,), generator=generator)
    cuts = torch.cat((some, torch.tensor(chunk_boundaries(window, rows // 2))))[:, None]  # (R, 1)
    own, other = (random_windows(text, rows, window + 1, generator) for _ in range(2))
    positions = torch.arange(window + 1)
    earlier = positions[:-1] < cuts  # (R, T)
    original = torch.stack((own[:, :-1], own[:, 1:]))  # (2, R, T): inputs and targets
    # the last target before the cut is the input at the cut, so targets change one position later than inputs
    inputs, targets = (torch.where(later, other, own) for later in (positions >= cuts, positions > cuts))
    replaced = torch.stack((inputs[:, :-1], targets[:, 1:]))
    with preserve_rng_state(), torch.no_grad():
        if perturb:
            network = perturbed_copy(network, 0.1, generator)
        if any(tensor.device != torch.device(device) for tensor in (*network.parameters(), *network.buffers())):
            network = copy_network(network).to(device)  # a copy, for `to` moves shared parameters in place
        with autocast:
            before, after = (_losses(network, text, device) for text in (original, replaced))
        if not before.isfinite().all():
            return None  # training has diverged; its own check says so
        change = _change(before, after).masked_fill(~earlier, 0.0)
        row = int(change.amax(1).argmax())
        if change[row].max() <= TOLERANCE:
            return None
        exact = exact_copy(network)
        with RoundingWatch() as rounding:
            before, after = (_losses(exact, text[:, row : row + 1], "cpu") for text in (original, replaced))
        exact_change = _change(before, after)[0].masked_fill(~earlier[row], 0.0)
        if exact_change.max() > max(EXACT_TOLERANCE, rounding.tolerance):
            return _breach(network, window, exact_change, int(cuts[row]))
        if ((change > CAST_TOLERANCE[torch.bfloat16]).sum(1) > MANY * earlier.sum(1)).any():
            return _breach(network, window, change[row], int(cuts[row]))
    return None


def _losses(network: Network, text: Tensor, device: torch.device | str) -> Losses:
    """(2, B, T) -> (B, T) on the CPU, by a copy in evaluation mode that shares the parameters."""
    network = copy_network(network, share_parameters=True).eval()
    seed_cpu(0)
    inputs, targets = text.to(device)
    return network.losses(inputs, targets)[0].double().cpu()


def _change(first: Tensor, second: Tensor) -> Tensor:
    """Relative to the largest loss; inf where only one of the two is a number."""
    return relative_change(first.clamp(max=-MIN_LOG_PROBABILITY), second.clamp(max=-MIN_LOG_PROBABILITY))


def _breach(network: Network, window: int, change: Tensor, cut: int) -> Breach:
    name = type(network).__name__
    return Breach("run", "eval", window, name, name, int(change.argmax()), cut, change.max().item())
