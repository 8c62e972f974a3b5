"""The causality audit finds every leak, and names the module; honest networks pass."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmx.audits.causality import audit_causality
from llmx.audits.causality_report import CausalityError, influence_figure
from llmx.errors import UserError
from llmx.mixers.attention import Attention
from llmx.networks.founding import FoundingNetwork
from tests.audits.mutants.honest import DroppingInExperts, DroppingOfSomeTokens, NoisyRouting
from tests.audits.mutants.mixers import Store
from tests.audits.networks import (
    HONEST,
    TIME_LEAKS,
    VOCAB,
    Bare,
    DependingOnTheBatchSize,
    ExpertChoice,
    KnowingTheLength,
    LeakingByItself,
    LongConvolution,
    LongConvolutionInFloat32,
    NormOverRows,
    OnlyInTraining,
    Overflowing,
    Part,
    Remembering,
    checks,
    decoder,
)


@pytest.mark.parametrize("mixer", HONEST)
def test_an_honest_network_passes(mixer):
    report = audit_causality(decoder(mixer), 70)
    assert report.breaches == ()
    assert not report.failing
    assert "no leak" in report.summary()


def test_a_cast_to_float32_inside_is_told_from_a_leak_by_its_size():
    report = audit_causality(decoder(LongConvolutionInFloat32), 13)
    assert report.tolerance == 1e-5
    assert "lower precision" in report.summary()
    assert audit_causality(decoder(LongConvolution), 13).tolerance == 1e-9


def test_dropout_everywhere_is_no_leak():
    network = decoder(partial(Attention, heads=2, dropout=0.3), dropout=0.3)
    report = audit_causality(network, 20)
    assert not report.failing
    assert not report.skipped


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
    assert not report.failing
    assert report.lengths[-1] == length


def test_one_length_is_prime_and_one_is_beyond_64_where_the_window_allows():
    assert audit_causality(decoder(), 32).lengths == (13, 32)
    assert audit_causality(decoder(), 128).lengths == (13, 97, 128)


class DroppingInEvaluation(Part):
    def mix(self, x):
        return F.dropout(x, 0.5, training=True)


class DroppingAtOddLengths(Part):
    def mix(self, x):
        return F.dropout(x, 0.5, training=x.shape[1] % 2 == 1)


class DroppingInLargerBatches(Part):
    def mix(self, x):
        return F.dropout(x, 0.5, training=self.training or len(x) > 2)


class NoisyByNumpy(Part):
    def mix(self, x):
        return x + torch.from_numpy(np.random.randn(x.shape[1]))[:, None].to(x.dtype)


@pytest.mark.parametrize("mixer", [DroppingInEvaluation, DroppingAtOddLengths, DroppingInLargerBatches, NoisyByNumpy])
def test_random_numbers_in_evaluation_are_a_verdict_of_their_own_and_name_the_module(mixer):
    report = audit_causality(decoder(mixer), 20)
    assert (report.verdict, report.leaking, report.failing) == ("RANDOM", False, True)
    assert f"the first module that draws is blocks.0.mixer ({mixer.__name__})" in str(CausalityError(report))


class StochasticDepth(Part):
    def mix(self, x):
        if self.training and torch.rand((), generator=torch.Generator().manual_seed(len(x))) < 0.5:
            return torch.zeros_like(x)
        return x * torch.bernoulli(torch.full((len(x), 1, 1), 0.8)) if self.training else x


@pytest.mark.parametrize("mixer", [DroppingInExperts, DroppingOfSomeTokens, StochasticDepth, NoisyRouting])
def test_draws_of_a_shape_that_depends_on_the_text_are_no_leak(mixer):
    report = audit_causality(decoder(mixer), 20)
    assert not report.failing
    assert not report.skipped


class LeakingAtSomeDraws(Part):
    def mix(self, x):
        return x + x.mean(1, keepdim=True) if self.training and torch.rand(()) < 0.3 else x


def test_a_leak_that_few_draws_open_is_found():
    report = audit_causality(decoder(LeakingAtSomeDraws), 20)
    assert "suffix" in checks(report)
    assert report.breaches[0].module == "blocks.0.mixer"


def test_who_writes_the_future_into_the_store_is_named_and_not_who_reads_it():
    report = audit_causality(decoder(Store), 20)
    assert {breach.module for breach in report.breaches if breach.check == "suffix"} == {"blocks.0.mixer"}


class WakingLate(Part):
    """Adds the batch before from the fourth batch on."""

    def __init__(self, site):
        super().__init__(site)
        self.calls, self.last = 0, 0.0

    def mix(self, x):
        mixed = x + (self.last if self.calls > 3 else 0.0)
        self.calls, self.last = self.calls + 1, x.mean((0, 1))
        return mixed


def test_a_memory_that_wakes_after_some_batches_is_found():
    report = audit_causality(decoder(WakingLate), 20)
    assert checks(report) == {"memory"}
    assert report.breaches[0].module == "blocks.0.mixer"


def test_a_network_that_is_not_finite_is_no_leak():
    report = audit_causality(decoder(Overflowing), 20)
    assert (report.verdict, report.leaking, report.failing) == ("NOT FINITE", False, True)
    assert str(CausalityError(report)).startswith("NOT FINITE: the output at position 0 is not finite")
    assert "the first module that is not finite is blocks.0.mixer (Overflowing)" in report.summary()


def test_a_network_without_embeddings_is_audited_and_the_gradient_said_to_be_skipped():
    report = audit_causality(Bare(), 20)
    assert not report.failing
    assert report.influence is None
    assert [line.split(":")[0] for line in report.skipped] == ["gradient"]
    with pytest.raises(ValueError, match="gradient"):
        influence_figure(report)


def test_a_vocabulary_of_one_leaves_the_checks_that_replace_nothing():
    report = audit_causality(Bare(vocab_size=1), 20)
    assert not report.failing
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
