"""The fast path: compilation and 16-bit precision change the speed and nothing else."""

import pytest
import torch

from llmx import LanguageModel
from tests.laboratory import metrics_of, record_of, weights_of


def test_compilation_changes_nothing_but_speed_and_happens_once_a_mode(laboratory):
    torch._dynamo.reset()
    eager = laboratory.fit("--model.compile", "false")
    torch._dynamo.utils.counters.clear()
    compiled = laboratory.fit("--model.compile", "true")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # training and evaluation, ragged batches too
    assert [record_of(run)["compiled"] for run in (eager, compiled)] == [False, True]
    assert weights_of(eager).keys() == weights_of(compiled).keys()
    losses = [metrics_of(run)["val/loss"] for run in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)  # fp32, fused sums in another order


def test_a_run_that_ends_in_its_warm_up_says_so(laboratory, caplog):
    laboratory.fit("--model.schedule.warmup_steps", 3)
    assert "model.schedule" not in caplog.text
    laboratory.fit("--model.schedule.warmup_steps", 7)
    assert "in 6 steps the learning rate rises to 75 % of that of model.optimizer" in caplog.text


def test_without_a_compiler_the_run_is_eager_and_says_so(laboratory, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    folder = laboratory.fit("--model.compile", "true")
    assert record_of(folder)["compiled"] is False
    assert "No C++ compiler was found" in caplog.text


def test_the_step_of_a_long_generation_is_compiled_once_and_gives_the_same_text(laboratory, monkeypatch):
    model = LanguageModel.load_from_checkpoint(
        laboratory.fit() / "checkpoints/last.ckpt"
    ).double()  # no argmax near a tie
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager = model.generate("e", max_new_tokens=60, temperature=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    monkeypatch.setattr("llmx.training.sampling.COMPILE_DECODING_FROM", 60)
    assert [model.generate("e", max_new_tokens=60, temperature=0) for _ in range(2)] == [eager, eager]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()  # as in another process, which finds what this one compiled
    torch._dynamo.utils.counters.clear()
    assert model.generate("e", max_new_tokens=60, temperature=0) == eager
    assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] == 1


def test_bf16_agrees_with_fp32(laboratory):
    single = laboratory.fit("--trainer.max_steps", 40)
    mixed = laboratory.fit("--trainer.max_steps", 40, "--trainer.precision", "bf16-mixed")
    losses = [metrics_of(run)["val/loss"] for run in (single, mixed)]
    assert losses[1] == pytest.approx(losses[0], abs=0.01)  # bf16 keeps 8 bits: about 0.4 % a product, averaged out
