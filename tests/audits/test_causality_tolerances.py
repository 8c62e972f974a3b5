"""What random tokens, rounding and chunks hide from the causality audit."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmx.audits.causality import audit_causality
from llmx.audits.inputs import chunk_boundaries
from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.networks.decoder import Decoder
from tests.audits.networks import ATTENTION, DIM, VOCAB, ExpertChoice, Part, checks, decoder


class Copying(Part):
    """Adds what followed the last place where these three tokens stood; `ahead`: also if that place is yet to come."""

    ahead = 0

    def __init__(self, site):
        super().__init__(site)
        self.out = nn.Linear(site.dim, site.dim)

    def forward(self, x, context):
        windows = F.pad(context.tokens, (2, 0), value=-1).unfold(1, 3, 1)  # (B, T, 3)
        same = (windows[:, :, None] == windows[:, None]).all(-1)[:, :, :-1]  # (B, T, T - 1)
        same &= torch.ones_like(same[0]).tril(-1) > 0 if not self.ahead else ~torch.eye(*same.shape[1:]).bool()
        followed = same.to(x.dtype) @ x[:, 1:]
        return self.out(followed) + x


class CopyingAhead(Copying):
    ahead = 1


TEXT = torch.tensor(
    [ord(c) % VOCAB for c in "to be or not to be that is the question whether it is nobler to be " * 20]
)


def test_a_leak_that_only_text_shows_is_found_in_text():
    network = decoder(CopyingAhead)
    assert "suffix" in checks(audit_causality(network, 40, text=TEXT))
    assert not audit_causality(decoder(Copying), 40, text=TEXT).leaking


class NoteBook(Part):
    """Remembers in evaluation what it saw, and finds it where the same comes again."""

    def __init__(self, site):
        super().__init__(site)
        self.seen = {}

    def forward(self, x, context):
        keys = [tuple(row) for row in context.tokens.tolist()]
        known = torch.tensor([float(not self.training and key in self.seen) for key in keys], dtype=x.dtype)
        self.seen |= dict.fromkeys(keys)
        return self.linear(x) + known[:, None, None]


def test_a_memory_that_only_the_same_text_wakes_is_found():
    assert checks(audit_causality(decoder(NoteBook), 20)) == {"memory"}


class HugeWhereThereIsNoToken(Decoder):
    def logits(self, hidden):
        logits = super().logits(hidden)
        return F.pad(logits, (0, 1), value=torch.finfo(torch.float32).min)


def test_one_huge_logit_does_not_make_all_changes_small():
    block = partial(PreNormBlock, feed_forward=partial(SwiGLU, hidden=16))
    network = HugeWhereThereIsNoToken(VOCAB, partial(block, mixer=ExpertChoice), dim=DIM, depth=2)
    assert "suffix" in checks(audit_causality(network, 20))
    network = HugeWhereThereIsNoToken(VOCAB, partial(block, mixer=ATTENTION), dim=DIM, depth=2)
    assert not audit_causality(network, 20).leaking


class Half(Part):
    """Everything is rounded to 16 bits, which hides what is smaller than their steps."""

    share = 0.0

    def mix(self, x):
        return (x + self.share * x.mean(1, keepdim=True)).bfloat16().to(x.dtype)


class HalfAndLeaking(Half):
    share = 0.02


def test_rounding_inside_does_not_hide_what_replacing_shows():
    assert "suffix" in checks(audit_causality(decoder(HalfAndLeaking), 20))
    assert not audit_causality(decoder(Half), 20).leaking


@pytest.mark.parametrize("size", [20, 32, 48, 64, 80, 100])
def test_one_position_at_the_seam_of_chunks_is_found(size):
    class Seam(Part):
        def mix(self, x):
            last = torch.arange(x.shape[1]) % size == size - 1
            return x + F.pad(x, (0, 0, 0, 1))[:, 1:] * last[:, None]

    assert "suffix" in checks(audit_causality(decoder(Seam), 128))


def test_seams_are_multiples_of_the_sizes_that_chunks_have():
    cuts = chunk_boundaries(1024, 8)
    assert all(any(cut % size == 0 for cut in cuts) for size in (8, 10, 16, 20, 32, 48, 50, 64, 80, 100, 128, 256, 512))
