"""The causality audit: no output may depend on a later token, nor on another row of the batch.

The audit runs a copy of the network in float64 on the CPU, where a leak of 1e-9 stands out from rounding. It moves the
weights away from their initialisation first, because a projection that starts at zero hides any leak behind it. It
tries training and evaluation mode, random tokens and text, and several lengths: a prime one, and one above 64 where the
window allows, so that chunked forms have a boundary inside. It makes these checks:

    finite    is every output finite?
    random    in evaluation: are the outputs of two identical calls the same? (dropout that was left on)
    suffix    replace all tokens from some position on: does an output before them change? (leaks without a gradient)
    prefix    cut off all tokens from some position on: does an output before them change? (leaks of the length)
    batch     replace one row, or leave the others out: does an output of another row change?
    memory    in evaluation: does an output depend on six batches before, of the same text or others?
    gradient  in evaluation: does an output have a gradient with respect to a later embedding? (tiny, smooth leaks)

An output is a log probability: among logits, one huge number for a masked token would make all changes look small. Each
pass begins with the same state. In training random draws are the lab's (llmx/audits/draws.py), so dropout and counters
are no leaks. The trap: a batch whose rows are changed at different positions confuses rows with time. So a suspected
leak is confirmed on rows that are all changed at the same position.

`audit_live_run`, in llmx/audits/live_run.py, looks for the leaks that a copy in float64 cannot show.
"""

import math
import time
from functools import partial

import torch
from torch import Tensor, nn

from llmx.audits.causality_cases import (
    AuditCase,
    AuditedNetwork,
    Calls,
    Part,
    Pass,
    first_leaking_module,
    row_parts,
    time_parts,
)
from llmx.audits.causality_report import CHECKS, CausalityReport
from llmx.audits.inputs import MAX_ROWS
from llmx.audits.network_copies import preserve_rng_state, seed_cpu
from llmx.audits.rounding import relative_change
from llmx.errors import UserError
from llmx.protocol import Logits, Network, Tokens

BATCHES = 6  # before the one that a memory may change


def audit_causality(network: Network, max_length: int, seed: int = 0, text: Tensor | None = None) -> CausalityReport:
    """Looks for outputs that depend on later tokens, on other rows, or on earlier batches.

    The network, in any mode and on any device, and the caller's random state stay as they are. A network of 10 M
    parameters takes some seconds. The longest sequence to try is usually the window. Large networks get shorter ones:
    see the report. `seed` seeds weights, tokens and cuts. `text`, token ids (L,), fills half of the rows: text repeats
    words and ends paragraphs, random tokens do not. Raises UserError for a length below 1, and whatever the network's
    own forward raises.
    """
    if max_length < 1:
        raise UserError(f"data.window: {max_length} tokens are too few to audit a network; give at least 1")
    started = time.perf_counter()
    with preserve_rng_state(), torch.no_grad():
        audited = AuditedNetwork(network, max_length, seed, text)
        for length in audited.lengths:
            for training in (False, True):
                case = AuditCase(audited, length, training)
                check_finite(case, case.tokens, case.outputs)
                checks = (check_random, check_batch, check_memory, check_suffix, check_prefix)
                for check in checks if case.outputs.isfinite().all() else ():
                    check(case)
        influence = check_gradient(audited)
    breaches = tuple(sorted(audited.breaches.values(), key=lambda breach: CHECKS.index(breach.check)))
    skipped = tuple(f"{check}: {reason}" for check, reason in audited.skipped.items())
    seconds = time.perf_counter() - started
    return CausalityReport(breaches, skipped, audited.lengths, audited.tolerance, influence, seconds)


# ---------------------------------------------------------------------------------------------------------- the checks
def check_finite(case: AuditCase, tokens: Tokens, outputs: Logits) -> None:
    def finite(tensors: list[Tensor]) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    if finite([outputs]) or case.found("finite"):
        return
    calls = Calls()
    case.run(tokens, calls=calls)
    culprits = (call for call in calls.values() if not finite(call.outputs) and finite(call.inputs))
    position = int((~outputs.isfinite()).any(-1).any(0).int().argmax())
    case.record("finite", next(culprits, None), position, 0, math.inf)


def check_random(case: AuditCase) -> None:
    if not case.training and not case.found("random") and case.draws:
        one, other = partial(case.run, case.tokens), partial(case.run, case.tokens, draw=1)
        case.breached("random", relative_change(one(), other()), 0, one, other, lambda tensor: [tensor], tolerance=0.0)


def check_batch(case: AuditCase) -> None:
    """Replaces the middle row. In evaluation, also runs it alone."""
    if case.found("batch"):
        return
    one, others = [1], [row for row in range(case.rows) if row != 1]
    base = partial(case.run, case.tokens)
    if case.network.vocab_size < 2:
        case.skip("batch", "a vocabulary of 1 has no other token; rows were left out, but not replaced")
    else:
        tokens = case.tokens.clone()
        tokens[one] = case.network.replaced(tokens[one])
        replaced = partial(case.run, tokens)
        part = partial(row_parts, rows=case.rows, keep=others)
        if case.breached("batch", relative_change(case.outputs, replaced())[others], 0, base, replaced, part):
            return
    if case.training or case.draws or case.found("random"):
        return
    alone = partial(case.run, case.tokens[one])
    part, part2 = partial(row_parts, rows=case.rows, keep=one), partial(row_parts, rows=1, keep=[0])
    case.breached("batch", relative_change(case.outputs[one], alone()), 0, base, alone, part, part2)


def check_memory(case: AuditCase) -> None:
    """Only at the shortest length: a memory does not wait for a long text."""
    if case.training or case.length > case.network.lengths[0] or case.draws:
        return
    base = partial(case.run, case.tokens)
    others = [case.network.tokens(case.rows, case.length) for _ in range(BATCHES)]
    for before in (others, [case.tokens] * BATCHES):
        again = partial(case.run, case.tokens, after=before)
        if case.breached("memory", relative_change(case.outputs, again()), 0, base, again, lambda tensor: [tensor]):
            return


def check_suffix(case: AuditCase) -> None:
    """Cuts every row at a position of its own, all in one pass."""
    if case.found("suffix"):
        return
    if case.length < 2 or case.network.vocab_size < 2:
        case.skip("suffix", f"a {'window' if case.length < 2 else 'vocabulary'} of 1 leaves nothing to replace")
        return
    cuts = case.network.cuts(case.length, MAX_ROWS // 2 if case.training else MAX_ROWS)
    tokens = case.network.tokens(len(cuts), case.length)
    other = case.network.replaced(tokens)
    later = torch.arange(case.length) >= cuts[:, None]  # (R, T)
    outputs = case.run(tokens)
    check_finite(case, tokens, outputs)
    change = relative_change(outputs, case.run(torch.where(later, other, tokens))).amax(-1).masked_fill(later, 0)
    worst = change.amax(1)  # (R,)
    suspects = [row for row in worst.argsort(descending=True).tolist() if worst[row] > case.network.same_tolerance]
    for row in suspects[:4]:
        cut, rows = int(cuts[row]), (row + torch.arange(4)) % len(cuts)
        first, second, part = _suffix_passes(case, tokens[rows], other[rows], cut)
        if case.breached("suffix", relative_change(first(), second())[:, :cut], cut, first, second, part):
            return
    if suspects and not case.found("batch"):  # otherwise another row changed this one
        row = suspects[0]
        case.record("suffix", None, int(change[row].argmax()), int(cuts[row]), worst[row].item())


def check_prefix(case: AuditCase) -> None:
    if case.length < 2:
        case.skip("prefix", "a window of 1 leaves nothing to cut off")
        return
    if case.training and case.length == case.network.lengths[-1] > case.network.lengths[0]:
        return  # a leak of the length in training alone shows at a shorter one
    if ("random", "eval") in case.network.breaches:
        return  # every length draws other numbers
    if case.draws:
        case.skip("prefix", "numpy or random draws other numbers in train mode for every length")
        return
    whole, cuts = partial(case.run, case.tokens[:2]), sorted({1, case.length // 2, 64, case.length - 1})
    outputs = whole()
    for cut in cuts:
        if cut < case.length and not case.found("prefix"):
            short = partial(case.run, case.tokens[:2, :cut])
            part = partial(time_parts, rows=2, length=case.length, keep=cut)
            part2 = partial(time_parts, rows=2, length=cut, keep=cut)
            case.breached("prefix", relative_change(outputs[:, :cut], short()), cut, whole, short, part, part2)


def check_gradient(audited: AuditedNetwork) -> Tensor | None:
    """Asks one row for each position, in one backward in eval mode. Returns the influence map (T, T)."""
    length = max(1, min(audited.lengths[-1], MAX_ROWS, math.isqrt(audited.budget)))
    case = AuditCase(audited, length, training=False)
    if case.found("batch") or case.found("finite"):
        case.skip("gradient", "it needs finite outputs, and rows that do not influence each other")
        return None
    tokens = case.tokens[:1].repeat(length, 1)
    projection = torch.randn(case.outputs.shape[-1], generator=audited.generator, dtype=torch.float64)
    gradients = _gradients(audited.fresh_copy(training=False), tokens, projection)
    if not gradients:
        case.skip("gradient", "no gradient leads from the outputs to an nn.Embedding of the tokens")
        return None
    influence = torch.stack([gradient.square().flatten(2).sum(-1) for gradient in gradients]).sum(0).sqrt()  # (T, T)
    if not influence.isfinite().all():
        case.record("finite", None, int((~influence.isfinite()).any(1).int().argmax()), 0, math.inf)
        return influence
    size = (influence.triu(1).max() / influence.max().clamp_min(torch.finfo().tiny)).item()
    if size > audited.tolerance:
        position, changed = divmod(int(influence.triu(1).argmax()), length)
        culprit = None
        if audited.vocab_size > 1:
            first, second, part = _suffix_passes(case, tokens[:4], audited.replaced(tokens[:4]), position + 1)
            culprit = first_leaking_module(first, second, part, part, audited.same_tolerance)
        case.record("gradient", culprit, position, changed, size)
    return influence


# ------------------------------------------------------------------------------------------------------ passes, parts
def _suffix_passes(case: AuditCase, tokens: Tokens, other: Tokens, cut: int) -> tuple[Pass, Pass, Part]:
    """Replaces all rows from the same position on, so that no row can change another before it."""
    changed = torch.where(torch.arange(case.length) >= cut, other, tokens)
    part = partial(time_parts, rows=len(tokens), length=case.length, keep=cut)
    return partial(case.run, tokens), partial(case.run, changed), part


def _gradients(network: Network, tokens: Tokens, projection: Tensor) -> list[Tensor]:
    """For each row t of tokens (T, T): the gradients of its projected output t by its embeddings, (T, T, D) each."""
    embeddings: list[Tensor] = []

    def capture(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if args[0].shape != tokens.shape or not torch.equal(args[0].long(), tokens):
            return None
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # the next module may write in place

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
