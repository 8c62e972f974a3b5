"""The blind pass before the first step: the run's own precision and device, the whole window, text.

The causality audit runs a copy in float64. This one finds what that cannot show: branches for 16 bits or for a GPU, and
leaks that only a long window shows. It moves the weights of a copy first, because a projection that starts at zero
hides any leak behind it. With such weights a leak is no gain, so the change of the losses alone decides (see
llmx/audits/blind.py).
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from llmx.audits.blind import Seen, beyond_rounding, blind_pass, change, scored
from llmx.audits.blind_location import locate
from llmx.audits.causality_report import Breach
from llmx.audits.inputs import MAX_ROWS, MAX_WORK, chunk_boundaries, random_windows, token_budget
from llmx.audits.network_copies import copy_network, perturbed_copy, preserve_rng_state
from llmx.audits.score import Score
from llmx.protocol import Network


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
    """Looks for losses that depend on later text or other rows, in evaluation mode. Returns the largest change that is
    not rounding.

    The network, whole and not sharded, and the caller's random state stay as they are. The audit tries sequences as
    long as the window, two at least, with the run's precision (`autocast`) and device. `text` has token ids (L,),
    random ones if not given. `perturb` moves the weights first. One pass has at most `tokens`; a large network gets
    fewer. `seed` seeds rows, cuts and weights.
    """
    if window < 2 or network.vocab_size < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    if text is None or len(text) <= window:
        text = torch.randint(network.vocab_size, (4 * window + 1,), generator=generator)
    rows = max(2, min(MAX_ROWS, token_budget(network, tokens, 2 * MAX_WORK) // window))
    some = torch.randint(1, window, (rows - rows // 2,), generator=generator)
    cuts = torch.cat((some, torch.tensor(chunk_boundaries(window, rows // 2))))  # (R,)
    windows = random_windows(text, rows, window + 1, generator)
    inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    with preserve_rng_state(), torch.no_grad():
        copy = perturbed_copy(network, 0.1, generator) if perturb else copy_network(network)
        score = Score(copy.to(device).eval())
        order = torch.randperm(rows, generator=generator)
        with autocast:
            seen = Seen(inputs, targets, scored(score, inputs, targets, rows, device))
            blind = blind_pass(score, seen, order, cuts[order], rows, device)
            changed = change(seen, blind)
            if not changed.finite:
                return None  # training has diverged; its own check says so
            if not beyond_rounding(score.network, seen, blind, changed, score.precision):
                return None
            location = locate(score, seen, blind, changed, rows, device)
    sizes = changed.losses.abs()
    row = int(sizes.amax(1).argmax())
    name = type(network).__name__
    module, kind = (location.culprit.module, location.culprit.module_class) if location.culprit else (name, name)
    position, cut, size = int(sizes[row].argmax()), int(blind.cuts[row]), sizes[row].max().item()
    check = "random" if location.verdict == "RANDOM" else "run"
    return Breach(check, "eval", window, module or name, kind, position, cut, size, location.what)
