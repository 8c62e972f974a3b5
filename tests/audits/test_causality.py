import json
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmx.audits.causality import audit_causality
from llmx.audits.causality_report import CausalityError, CausalityReport, influence_figure
from llmx.audits.inputs import chunk_boundaries
from llmx.blocks.prenorm import PreNormBlock
from llmx.errors import UserError
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.networks.founding import FoundingNetwork
from llmx.protocol import Context, Mixer, Network, Site

VOCAB, DIM = 7, 8
ATTENTION = partial(Attention, heads=2)


@pytest.fixture(autouse=True)
def _same_weights_every_time():
    torch.manual_seed(0)


def decoder(mixer=ATTENTION, **options) -> Decoder:
    block = partial(PreNormBlock, mixer=mixer, feed_forward=partial(SwiGLU, hidden=16))
    return Decoder(VOCAB, block, dim=DIM, depth=2, **options)


class Part(Mixer):
    """A mixer for one test; `linear` stands before its leak."""

    def __init__(self, site: Site):
        super().__init__()
        self.linear = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.mix(self.linear(x))

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError


# ------------------------------------------------------------------------------------------- honest, and easily accused
class RunningMean(Part):
    def mix(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


class CausalConvolution(Part):
    def __init__(self, site):
        super().__init__(site)
        self.convolution = nn.Conv1d(site.dim, site.dim, 3, padding=2)  # its output is two longer than the input

    def mix(self, x):
        return self.convolution(x.mT)[..., : x.shape[1]].mT


class LongConvolution(Part):
    """By FFT, padded: every number in it is rounded with the future in it."""

    def mix(self, x):
        length = x.shape[1]
        kernel = 0.9 ** torch.arange(length, dtype=x.dtype)[:, None]
        product = torch.fft.rfft(x, 2 * length, dim=1) * torch.fft.rfft(kernel, 2 * length, dim=0)
        return torch.fft.irfft(product, 2 * length, dim=1)[:, :length]


class LongConvolutionInFloat32(LongConvolution):
    def mix(self, x):
        return super().mix(x.float()).to(x.dtype)


class Recurrence(Part):
    """Its cell is called once for each position."""

    def __init__(self, site):
        super().__init__(site)
        self.cell = nn.GRUCell(site.dim, site.dim)

    def mix(self, x):
        state, states = x[:, 0] * 0, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            states.append(state)
        return torch.stack(states, 1)


class Flattening(Part):
    """Treats all tokens as one list, as mixtures of experts do."""

    def mix(self, x):
        flat = self.linear(x.flatten(0, 1))
        best = flat.argmax(-1)
        return (flat * (best % 2)[:, None]).view_as(x)


class CountingInTraining(Part):
    """A buffer and an attribute that every training pass changes, and that later passes read."""

    def __init__(self, site):
        super().__init__(site)
        self.register_buffer("passes", torch.zeros(()))
        self.calls = 0

    def mix(self, x):
        if self.training:
            self.passes += 1
            self.calls += 1
        return x * (1 + self.passes + self.calls)


class DroppingWithAllGenerators(Part):
    def mix(self, x):
        keep = random.random() + np.random.rand() if self.training else 1.0
        return F.dropout(x, 0.5, self.training) * keep


HONEST = [
    ATTENTION,
    RunningMean,
    CausalConvolution,
    LongConvolution,
    LongConvolutionInFloat32,
    Recurrence,
    Flattening,
    CountingInTraining,
    DroppingWithAllGenerators,
]


# ------------------------------------------------------------------------------------------------------------- leaking
class NormOverTime(nn.Module):
    def forward(self, x):
        return x * x.square().mean((1, 2), keepdim=True).rsqrt()


class WithNormOverTime(Part):
    def __init__(self, site):
        super().__init__(site)
        self.norm = NormOverTime()
        self.after = nn.Linear(site.dim, site.dim)

    def mix(self, x):
        return self.after(self.norm(x))


class CentredConvolution(Part):
    def __init__(self, site):
        super().__init__(site)
        self.convolution = nn.Conv1d(site.dim, site.dim, 3, padding=1)

    def mix(self, x):
        return self.convolution(x.mT).mT


class SumFromTheWrongEnd(Part):
    def mix(self, x):
        return x.flip(1).cumsum(1).flip(1)


class ExpertChoice(Part):
    """The expert takes the best half of the tokens of each row: no gradient tells on it."""

    def mix(self, x):
        score = x.detach().sum(-1) + torch.linspace(0, 1e-3, x.shape[1])  # equal tokens are no tie
        chosen = torch.zeros_like(score).scatter(1, score.topk((x.shape[1] + 1) // 2, 1).indices, 1.0)
        return x * chosen[..., None]


class OnlyInTraining(Part):
    def mix(self, x):
        return x + x.mean(1, keepdim=True) if self.training else x


class BehindZeros(Part):
    def __init__(self, site):
        super().__init__(site)
        self.out = nn.Linear(site.dim, site.dim)
        nn.init.zeros_(self.out.weight)

    def mix(self, x):
        return self.out(x.mean(1, keepdim=True).expand_as(x))


class AtOddLengths(Part):
    def mix(self, x):
        return x + x[:, -1:] if x.shape[1] % 2 else x


class AtEvenLengths(Part):
    def mix(self, x):
        return x + x[:, -1:] if x.shape[1] % 2 == 0 else x


class BeyondSixtyFour(Part):
    """The second chunk looks at its own end."""

    def mix(self, x):
        return torch.cat((x[:, :64], x[:, 64:] + x[:, 64:].mean(1, keepdim=True)), 1) if x.shape[1] > 64 else x


class Tiny(Part):
    def mix(self, x):
        return x + 1e-6 * x.mean(1, keepdim=True)


class InPlace(Part):
    def mix(self, x):
        x += x.mean(1, keepdim=True)
        return x


class KnowingTheLength(Part):
    """Replacing the future changes nothing, cutting it off does."""

    def mix(self, x):
        return x * x.shape[1]


TIME_LEAKS = {
    WithNormOverTime: "blocks.0.mixer.norm",
    CentredConvolution: "blocks.0.mixer.convolution",
    SumFromTheWrongEnd: "blocks.0.mixer",
    ExpertChoice: "blocks.0.mixer",
    OnlyInTraining: "blocks.0.mixer",
    BehindZeros: "blocks.0.mixer",
    AtOddLengths: "blocks.0.mixer",
    AtEvenLengths: "blocks.0.mixer",
    BeyondSixtyFour: "blocks.0.mixer",
    Tiny: "blocks.0.mixer",
    InPlace: "blocks.0.mixer",
    KnowingTheLength: "blocks.0.mixer",
}


class NormOverRows(Part):
    """Each position by itself, but over the rows."""

    def mix(self, x):
        return x - x.mean(0, keepdim=True)


class DependingOnTheBatchSize(Part):
    def mix(self, x):
        return x * len(x)


class Remembering(Part):
    """Adds what the last batch was to this one."""

    def __init__(self, site):
        super().__init__(site)
        self.register_buffer("last", torch.zeros(site.dim))

    def mix(self, x):
        mixed = x + self.last
        self.last = x.mean((0, 1)).detach()
        return mixed


class Overflowing(Part):
    def mix(self, x):
        return x / torch.zeros_like(x)


class Bare(Network):
    """Nothing but what `hidden` does."""

    def __init__(self, vocab_size: int = VOCAB):
        super().__init__()
        self.vocab_size = vocab_size

    def hidden(self, tokens):
        x = F.one_hot(tokens, self.vocab_size).double()
        return x, Context(tokens, torch.arange(tokens.shape[1])[None], x)

    def logits(self, hidden):
        return hidden


class LeakingByItself(Bare):
    """The leak stands between its modules."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(VOCAB, DIM), nn.Linear(DIM, VOCAB)

    def logits(self, hidden):
        x = self.first(hidden)
        return self.second(x + x.mean(1, keepdim=True))


def checks(report: CausalityReport) -> set[str]:
    return {breach.check for breach in report.breaches}


# --------------------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize("mixer", HONEST)
def test_an_honest_network_passes(mixer):
    report = audit_causality(decoder(mixer), 70)
    assert report.breaches == ()
    assert not report.leaking
    assert "no leak" in report.summary()


def test_a_cast_to_float32_inside_is_told_from_a_leak_by_its_size():
    report = audit_causality(decoder(LongConvolutionInFloat32), 13)
    assert report.tolerance == 1e-5
    assert "lower precision" in report.summary()
    assert audit_causality(decoder(LongConvolution), 13).tolerance == 1e-9


def test_dropout_everywhere_is_no_leak():
    network = decoder(partial(Attention, heads=2, dropout=0.3), dropout=0.3)
    report = audit_causality(network, 20)
    assert not report.leaking
    assert [line.split(":")[0] for line in report.skipped] == ["prefix"]


@pytest.mark.parametrize("mixer", TIME_LEAKS)
def test_a_leak_of_time_is_found_and_its_module_named(mixer):
    report = audit_causality(decoder(mixer), 70)
    assert report.leaking
    assert checks(report) <= {"suffix", "prefix", "gradient"}
    assert report.breaches[0].module == TIME_LEAKS[mixer]
    assert len({breach.module_class for breach in report.breaches}) == 1  # a check may meet the leak in block 1 first
    for breach in report.breaches:
        assert breach.position < breach.changed
        assert breach.size > report.tolerance


def test_a_leak_without_a_gradient_is_found_by_replacing():
    report = audit_causality(decoder(ExpertChoice), 20)
    assert "suffix" in checks(report)
    assert "gradient" not in checks(report)


def test_a_leak_in_training_alone_is_said_to_be_one():
    report = audit_causality(decoder(OnlyInTraining), 20)
    assert {breach.mode for breach in report.breaches} == {"train"}


def test_knowing_the_length_is_found_by_cutting():
    assert checks(audit_causality(decoder(KnowingTheLength), 20)) == {"prefix"}


@pytest.mark.parametrize("mixer", [NormOverRows, DependingOnTheBatchSize])
def test_a_leak_between_rows_is_not_mistaken_for_one_of_time(mixer):
    report = audit_causality(decoder(mixer), 20)
    assert checks(report) == {"batch"}
    assert {breach.module for breach in report.breaches} == {"blocks.0.mixer"}
    assert any(line.startswith("gradient") for line in report.skipped)


def test_batch_norm_over_rows_and_time_breaches_both():
    class BatchNorm(Part):
        def __init__(self, site):
            super().__init__(site)
            self.norm = nn.BatchNorm1d(site.dim)

        def mix(self, x):
            return self.norm(x.mT).mT

    report = audit_causality(decoder(BatchNorm), 20)
    assert {(breach.check, breach.mode) for breach in report.breaches} >= {("batch", "train"), ("suffix", "train")}
    assert {breach.mode for breach in report.breaches} == {"train"}
    assert {breach.module for breach in report.breaches} == {"blocks.0.mixer.norm"}


def test_a_memory_of_earlier_batches_is_found():
    report = audit_causality(decoder(Remembering), 20)
    assert checks(report) == {"memory"}
    assert report.breaches[0].module == "blocks.0.mixer"


def test_a_leak_between_modules_is_laid_on_the_one_that_contains_them():
    report = audit_causality(LeakingByItself(), 20)
    assert {breach.module for breach in report.breaches} == {"LeakingByItself"}
    assert {breach.module_class for breach in report.breaches} == {"LeakingByItself"}


def test_outputs_that_are_not_finite_are_reported_as_such():
    report = audit_causality(decoder(Overflowing), 20)
    assert checks(report) == {"finite"}
    assert report.breaches[0].module == "blocks.0.mixer"
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["breaches"][0]["size"] is None


@pytest.mark.parametrize("dim", [16, 32, 208])  # 32 and 16 * 13: the axes look like time
def test_the_founding_experiment_leaks_through_its_norm(dim):
    report = audit_causality(FoundingNetwork(VOCAB, dim=dim, depth=2), 32)
    assert {breach.module for breach in report.breaches} == {"blocks.0.norm"}
    assert {breach.module_class for breach in report.breaches} == {"FoundingNorm"}
    assert checks(report) == {"suffix", "prefix", "gradient"}


@settings(max_examples=25, deadline=None)
@given(reach=st.integers(1, 12), shape=st.sampled_from(["one", "all"]), size=st.sampled_from([1.0, 1e-4]))
def test_every_reach_into_the_future_is_found(reach, shape, size):
    class Reaching(Part):
        def mix(self, x):
            ahead = F.pad(x, (0, 0, 0, reach))
            steps = [reach] if shape == "one" else range(1, reach + 1)
            return x + size * sum(ahead[:, step : step + x.shape[1]] for step in steps)

    report = audit_causality(decoder(Reaching), 13)
    assert "suffix" in checks(report)
    assert {breach.module for breach in report.breaches} == {"blocks.0.mixer"}


@settings(max_examples=12, deadline=None)
@given(length=st.integers(1, 40), seed=st.integers(0, 100))
def test_an_honest_network_passes_at_every_window_and_seed(length, seed):
    report = audit_causality(decoder(), length, seed)
    assert not report.leaking
    assert report.lengths[-1] == length


def test_one_length_is_prime_and_one_is_beyond_64_where_the_window_allows():
    assert audit_causality(decoder(), 32).lengths == (13, 32)
    assert audit_causality(decoder(), 128).lengths == (13, 97, 128)


# --------------------------------------------------------------------------------------------- what random tokens hide
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


# ------------------------------------------------------------------------------------------------- what tolerances hide
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


# ------------------------------------------------------------------------------------------------------------ the loss
class Teacher(Decoder):
    """Reads the targets."""

    def loss(self, hidden, targets):
        return super().loss(hidden + self.embedding(targets.clamp(min=0), torch.zeros_like(targets)), targets)


class Cheap(Decoder):
    def losses(self, tokens, targets):
        losses, auxiliary = super().losses(tokens, targets)
        return losses / 2, auxiliary


@pytest.mark.parametrize("kind", [Teacher, Cheap])
def test_a_loss_that_is_not_the_cross_entropy_of_the_logits_is_found(kind):
    block = partial(PreNormBlock, mixer=ATTENTION, feed_forward=partial(SwiGLU, hidden=16))
    report = audit_causality(kind(VOCAB, block, dim=DIM, depth=2), 20)
    assert checks(report) == {"losses"}
    assert "cheats: the loss at position" in str(CausalityError(report))


# ------------------------------------------------------------------------------------------------ what it leaves alone
def test_network_and_random_states_stay_as_they_were():
    network = decoder(CountingInTraining)
    network.blocks[0].eval()
    network(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)

    def everything() -> list[object]:
        tensors = [*network.state_dict().values(), *(p.grad for p in network.parameters()), torch.get_rng_state()]
        modes = [(m.training, len(m._forward_hooks)) for m in network.modules()]
        return [t.clone() for t in tensors] + [modes, random.getstate(), np.random.get_state()[1].tolist()]

    before = everything()
    audit_causality(network, 20)
    for one, two in zip(before, everything(), strict=True):
        assert torch.equal(one, two) if isinstance(one, Tensor) else one == two
    assert network.blocks[1].mixer.calls == 1
    assert all(p.dtype == torch.float32 and p.requires_grad for p in network.parameters())


def test_the_report_is_a_function_of_the_seed():
    network = decoder(WithNormOverTime)
    first, second = audit_causality(network, 20, seed=3), audit_causality(network, 20, seed=3)
    assert first.breaches == second.breaches
    assert torch.equal(first.influence, second.influence)


def test_gradients_may_be_off_or_checkpointed():
    network = decoder(WithNormOverTime)
    network.enable_gradient_checkpointing()
    with torch.no_grad():
        report = audit_causality(network, 20)
    assert "gradient" in checks(report)


# ----------------------------------------------------------------------------------------------------- what cannot run
def test_a_network_without_embeddings_is_audited_and_the_gradient_said_to_be_skipped():
    report = audit_causality(Bare(), 20)
    assert not report.leaking
    assert report.influence is None
    assert [line.split(":")[0] for line in report.skipped] == ["gradient"]
    with pytest.raises(ValueError, match="gradient"):
        influence_figure(report)


def test_a_vocabulary_of_one_leaves_the_checks_that_replace_nothing():
    report = audit_causality(Bare(vocab_size=1), 20)
    assert not report.leaking
    assert {line.split(":")[0] for line in report.skipped} == {"suffix", "batch", "gradient"}


def test_an_exception_of_the_network_comes_through():
    class Broken(Part):
        def mix(self, x):
            raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        audit_causality(decoder(Broken), 8)


def test_a_window_of_none_is_an_error_that_names_its_key():
    with pytest.raises(UserError, match=r"data\.window"):
        audit_causality(decoder(), 0)


# ------------------------------------------------------------------------------------------------------------- telling
def test_the_error_names_the_module_and_the_way_on():
    report = audit_causality(decoder(WithNormOverTime), 13)
    error = CausalityError(report)
    assert isinstance(error, UserError)
    assert error.report is report
    for words in ("blocks.0.mixer.norm (NormOverTime)", "--model.audit warn", "only positions from", "length 13"):
        assert words in str(error)
    assert "LEAKING" in report.summary()
    assert json.loads(json.dumps(report.to_dict()))["breaches"][0]["module_class"] == "NormOverTime"


def test_influence_is_zero_above_the_diagonal_of_an_honest_network():
    influence = audit_causality(decoder(), 20).influence
    assert influence.shape == (20, 20)
    assert not influence.triu(1).any()
    assert (influence.diagonal() > 0).all()


def test_influence_is_the_size_of_the_gradient():
    class Mean(Bare):
        """logits_t = sum_{s <= t} embedding_s / (t + 1)"""

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCAB, VOCAB)

        def logits(self, hidden):
            x = self.embedding(hidden.argmax(-1))
            return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]

    influence = audit_causality(Mean(), 12).influence
    expected = torch.ones(12, 12, dtype=torch.float64).tril() / torch.arange(1, 13)[:, None]
    torch.testing.assert_close(influence / influence[0, 0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("mixer", "title"), [(RunningMean, "causal"), (WithNormOverTime, "LEAKING")])
def test_the_figure_says_whether_the_network_leaks(mixer, title, tmp_path):
    figure = influence_figure(audit_causality(decoder(mixer), 16))
    assert figure.axes[0].get_title().startswith(title)
    figure.savefig(tmp_path / "influence.png")
    assert (tmp_path / "influence.png").stat().st_size > 0
