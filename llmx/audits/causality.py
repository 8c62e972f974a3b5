"""The causality audit: no output may depend on a later token, nor on another row of the batch.

It works on a copy of the network in float64 on the CPU, where a leak of 1e-9 stands out from rounding, with weights
moved away from their initialisation, because a projection that starts at zero hides whatever leaks behind it. In
training and in evaluation mode, at several lengths (a prime one, and one with more than 64 positions where the window
allows, so that chunked forms show their seams), on random tokens and on text, it asks:

    losses    in evaluation: is the loss what the logits give, the cross-entropy? (for it is logits that are looked at)
    suffix    replace all tokens from some position on: does an output before them change? (leaks without a gradient)
    prefix    cut all tokens off from some position on: does an output before them change? (leaks of the length)
    batch     replace one row, or leave the others out: does an output of another row change?
    memory    in evaluation: does an output depend on the batches that went before, of the same text or another?
    gradient  in evaluation: does an output have a gradient with respect to a later embedding? (tiny, smooth leaks)

and whether all outputs are `finite`. An output is the logarithm of a probability: as a logit, one huge number for what
is no token would make all changes look small. Each pass begins with the same state and the same random draws, so
dropout needs no exception and a counter in training is no leak. The trap: a batch whose rows are changed at different
positions confuses rows with time, so a suspected leak is confirmed on rows that are all changed at the same one.

What a copy in float64 cannot show, `audit_live_run` looks for, in llmx/audits/live_run.py.
"""

from __future__ import annotations

import math
import time
from functools import partial

import torch
from torch import Tensor, nn

from llmx.audits.causality_report import CHECKS, CausalityReport
from llmx.audits.copies import preserve_rng_state, seed_cpu
from llmx.audits.trials import LEAST, MAX_ROWS, Calls, Pass, Probe, Trial, View, change_of
from llmx.errors import UserError
from llmx.protocol import Logits, Network, Tokens

LOSS_TOLERANCE = 1e-4  # nats, between a loss in float32 and the cross-entropy


def audit_causality(network: Network, max_length: int, seed: int = 0, text: Tensor | None = None) -> CausalityReport:
    """Looks for outputs that depend on later tokens, on other rows, or on earlier batches.

    The network and the caller's random state stay as they are. A network of 10 M parameters takes some seconds.

    Args:
        network: in any mode, on any device.
        max_length: the longest sequence tried; the window. Large networks are tried at less, see the report's lengths.
        seed: of weights, tokens and cuts.
        text: token ids (L,), from which half the rows are taken, for what random tokens never are (a word again, the
            end of a paragraph).

    Raises:
        UserError: for a length below 1.
        Exception: whatever the network's own forward raises.
    """
    if max_length < 1:
        raise UserError(f"data.window: {max_length} tokens are too few to audit a network; give at least 1")
    started = time.perf_counter()
    with preserve_rng_state(), torch.no_grad():
        probe = Probe(network, max_length, seed, text)
        for length in probe.lengths:
            for training in (False, True):
                _audit(Trial(probe, length, training))
        influence = check_gradient(probe)
        return CausalityReport(
            breaches=tuple(sorted(probe.breaches.values(), key=lambda breach: CHECKS.index(breach.check))),
            skipped=tuple(f"{check}: {reason}" for check, reason in probe.skipped.items()),
            lengths=probe.lengths,
            tolerance=probe.tolerance,
            influence=influence,
            seconds=time.perf_counter() - started,
        )


def _audit(trial: Trial) -> None:
    check_finite(trial, trial.tokens, trial.outputs)
    if trial.outputs.isfinite().all():
        check_losses(trial)
        check_batch(trial)
        check_memory(trial)
        check_suffix(trial)
        check_prefix(trial)


# ---------------------------------------------------------------------------------------------------------- the checks
def check_finite(trial: Trial, tokens: Tokens, outputs: Logits) -> None:
    bad = ~outputs.isfinite().all(-1)  # (B, T)
    if not bad.any() or trial.found("finite"):
        return
    calls = Calls()
    trial.run(tokens, calls=calls)
    spoiled = (call for call in calls.values() if not _finite(call.outputs) and _finite(call.inputs))
    trial.breach("finite", next(spoiled, None), int(bad.any(0).int().argmax()), 0, math.inf)


def check_losses(trial: Trial) -> None:
    if trial.training or trial.found("losses"):
        return
    targets = trial.probe.tokens(trial.rows, trial.length)
    network = trial.probe.network(training=False)
    seed_cpu(0)
    losses = network.losses(trial.tokens.clone(), targets.clone())[0]
    expected = -trial.outputs.gather(-1, targets[..., None])[..., 0]
    # an end of the scale may stand for what is no token
    away = (losses.double().clamp(max=-LEAST) - expected).abs().nan_to_num(nan=math.inf)
    if away.max() > LOSS_TOLERANCE + trial.probe.tolerance * -LEAST:
        trial.breach("losses", None, int(away.amax(0).argmax()), 0, away.max().item())


def check_batch(trial: Trial) -> None:
    """Replaces the middle row; in evaluation, also looks at it alone."""
    if trial.found("batch"):
        return
    one, others = [1], [row for row in range(trial.rows) if row != 1]
    base = partial(trial.run, trial.tokens)
    if trial.probe.vocab_size < 2:
        trial.skip("batch", "a vocabulary of 1 has no other token; rows were left out, but not replaced")
    else:
        tokens = trial.tokens.clone()
        tokens[one] = trial.probe.replaced(tokens[one])
        replaced = partial(trial.run, tokens)
        view = partial(_row_views, rows=trial.rows, keep=others)
        if trial.judge("batch", change_of(trial.outputs, replaced())[others], 0, base, replaced, view):
            return
    if trial.training:
        return
    if trial.draws:
        trial.skip("batch", "the network draws random numbers in eval mode; rows were replaced, but not left out")
        return
    alone = partial(trial.run, trial.tokens[one])
    view, view2 = partial(_row_views, rows=trial.rows, keep=one), partial(_row_views, rows=1, keep=[0])
    trial.judge("batch", change_of(trial.outputs[one], alone()), 0, base, alone, view, view2)


def check_memory(trial: Trial) -> None:
    if trial.training or trial.found("memory"):
        return
    base = partial(trial.run, trial.tokens)
    for before in (trial.probe.tokens(trial.rows, trial.length), trial.tokens):
        again = partial(trial.run, trial.tokens, after=before)
        if trial.judge("memory", change_of(trial.outputs, again()), 0, base, again, _whole):
            return


def check_suffix(trial: Trial) -> None:
    """Every row is cut at a position of its own, all of them in one pass."""
    if trial.found("suffix"):
        return
    if trial.length < 2 or trial.probe.vocab_size < 2:
        trial.skip("suffix", f"a {'window' if trial.length < 2 else 'vocabulary'} of 1 leaves nothing to replace")
        return
    cuts = trial.probe.cuts(trial.length)
    tokens = trial.probe.tokens(len(cuts), trial.length)
    other = trial.probe.replaced(tokens)
    later = torch.arange(trial.length) >= cuts[:, None]  # (R, T)
    outputs = trial.run(tokens)
    check_finite(trial, tokens, outputs)
    change = change_of(outputs, trial.run(torch.where(later, other, tokens))).amax(-1).masked_fill(later, 0)  # (R, T)
    worst = change.amax(1)  # (R,)
    suspects = [row for row in worst.argsort(descending=True).tolist() if worst[row] > trial.probe.same_tolerance]
    for row in suspects[:4]:
        cut, rows = int(cuts[row]), (row + torch.arange(4)) % len(cuts)
        first, second, view = _suffix_passes(trial, tokens[rows], other[rows], cut)
        if trial.judge("suffix", change_of(first(), second())[:, :cut], cut, first, second, view):
            return
    if suspects and not trial.found("batch"):  # else it was another row that changed this one
        row = suspects[0]
        trial.breach("suffix", None, int(change[row].argmax()), int(cuts[row]), worst[row].item())


def check_prefix(trial: Trial) -> None:
    if trial.length < 2:
        trial.skip("prefix", "a window of 1 leaves nothing to cut off")
        return
    if trial.draws:
        trial.skip("prefix", f"the network draws random numbers in {trial.mode} mode, other ones for every length")
        return
    for cut in sorted({1, trial.length // 2, 64, trial.length - 1}):
        if cut < trial.length and not trial.found("prefix"):
            whole, short = partial(trial.run, trial.tokens), partial(trial.run, trial.tokens[:, :cut])
            view = partial(_time_views, rows=trial.rows, length=trial.length, keep=cut)
            view2 = partial(_time_views, rows=trial.rows, length=cut, keep=cut)
            trial.judge("prefix", change_of(trial.outputs[:, :cut], short()), cut, whole, short, view, view2)


def check_gradient(probe: Probe) -> Tensor | None:
    """A row for every position, one backward in eval mode. Returns the influence map (T, T)."""
    trial = Trial(probe, max(1, min(probe.lengths[-1], MAX_ROWS, math.isqrt(probe.budget))), training=False)
    if trial.found("batch") or trial.found("finite"):
        trial.skip("gradient", "it needs finite outputs, and rows that do not influence each other")
        return None
    tokens = trial.tokens[:1].repeat(trial.length, 1)
    projection = torch.randn(trial.outputs.shape[-1], generator=probe.generator, dtype=torch.float64)
    gradients = _gradients(probe.network(training=False), tokens, projection)
    if not gradients:
        trial.skip("gradient", "no gradient leads from the outputs to an nn.Embedding of the tokens")
        return None
    influence = torch.stack([gradient.square().flatten(2).sum(-1) for gradient in gradients]).sum(0).sqrt()  # (T, T)
    bad = ~influence.isfinite()
    if bad.any():
        trial.breach("finite", None, int(bad.any(1).int().argmax()), 0, math.inf)
        return influence
    size = (influence.triu(1).max() / influence.max().clamp_min(torch.finfo().tiny)).item()
    if size > probe.tolerance:
        position, changed = divmod(int(influence.triu(1).argmax()), trial.length)
        culprit = None
        if probe.vocab_size > 1:
            first, second, view = _suffix_passes(trial, tokens[:4], probe.replaced(tokens[:4]), position + 1)
            culprit = trial.locate(first, second, view, view, probe.same_tolerance)
        trial.breach("gradient", culprit, position, changed, size)
    return influence


# ------------------------------------------------------------------------------------------------------ passes, views
def _suffix_passes(trial: Trial, tokens: Tokens, other: Tokens, cut: int) -> tuple[Pass, Pass, View]:
    """All rows are replaced from one and the same position on, so that none can change another before it."""
    changed = torch.where(torch.arange(trial.length) >= cut, other, tokens)
    view = partial(_time_views, rows=len(tokens), length=trial.length, keep=cut)
    return partial(trial.run, tokens), partial(trial.run, changed), view


def _time_views(tensor: Tensor, rows: int, length: int, keep: int) -> list[Tensor]:
    """The first `keep` positions of a tensor, time in front; none where it has no time axis."""
    views = [tensor.movedim(axis, 0) for axis, size in enumerate(tensor.shape) if size == length]
    if tensor.ndim and tensor.shape[0] == rows * length:
        views.append(tensor.unflatten(0, (rows, length)).movedim(1, 0))
    return [view[:keep] for view in views]


def _row_views(tensor: Tensor, rows: int, keep: list[int]) -> list[Tensor]:
    """The rows `keep` of a tensor, rows in front; none where it has no batch axis."""
    views = [tensor.movedim(axis, 0) for axis, size in enumerate(tensor.shape) if size == rows]
    if tensor.ndim and tensor.shape[0] != rows and tensor.shape[0] % rows == 0:
        views.append(tensor.unflatten(0, (rows, -1)))
    return [view[keep] for view in views]


def _whole(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _finite(tensors: list[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _gradients(network: Network, tokens: Tokens, projection: Tensor) -> list[Tensor]:
    """Of each row t of tokens (T, T) the gradient of its output t, projected, by its embeddings: (T, T, D) each."""
    embeddings: list[Tensor] = []

    def capture(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if args[0].shape != tokens.shape or not torch.equal(args[0].long(), tokens):
            return None
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # what follows may write in place

    for module in network.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(capture)
    seed_cpu(0)
    with torch.enable_grad():
        outputs = network(tokens).double()
        if not embeddings or not outputs.requires_grad:
            return []
        own = outputs.diagonal(dim1=0, dim2=1).T @ projection  # (T,)
        gradients = torch.autograd.grad(own.sum(), embeddings, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]
