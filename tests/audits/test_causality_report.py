"""What the causality audit reports, and what it leaves alone."""

import json
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmx.audits.causality import audit_causality
from llmx.audits.causality_report import CausalityError, influence_figure
from llmx.errors import UserError
from tests.audits.networks import (
    VOCAB,
    Bare,
    CountingInTraining,
    RunningMean,
    WithNormOverTime,
    checks,
    decoder,
)


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
