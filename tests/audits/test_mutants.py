"""Networks that cheat, in every slot, and honest ones that look like them, through `fit` as a user runs it.

Each cheat has its verdict, the module that the message names, and the moment: before step 1, where no run folder is
left, or at a validation.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmx import LanguageModel
from llmx.audits.score import Score
from llmx.data.datamodule import TextDataModule
from tests.audits import networks
from tests.audits.mutants import mixers
from tests.laboratory import curves_of, metrics_of, newest_run, record_of

MUTANTS = "tests.audits.mutants"
START, VALIDATION = "", " at step "  # what follows the verdict
MIXER = "blocks.0.mixer"


def with_mixer(name: str) -> dict[str, Any]:
    """A mixer of tests/audits/networks.py, or of the mutants."""
    return {"mixer": f"{(networks if hasattr(networks, name) else mixers).__name__}.{name}"}


def slot(name: str) -> str:
    return f"{MUTANTS}.slots.{name}"


BF16 = ["--trainer.precision", "bf16-mixed"]
BATCH = ["--data.batch_size", "64", "--data.val_stride", "2"]
COMPILED = ["--model.compile", "true"]
MIXERS = [  # class, verdict, moment, named, flags
    *((name, "LEAKING", START, MIXER, []) for name in ("Mean", "Flip", "Next", "ExpertChoice", "OwnBlock", "Seam")),
    ("CentredConvolution", "LEAKING", START, f"{MIXER}.convolution", []),
    ("AtTheWindow", "LEAKING", START, MIXER, []),
    ("InManyRows", "LEAKING", VALIDATION, MIXER, BATCH),
    ("In16Bits", "LEAKING", START, MIXER, BF16),
    ("InSinglePrecision", "LEAKING", START, MIXER, []),
    ("Compiled", "LEAKING", VALIDATION, "", COMPILED),
    ("AfterTwoSteps", "LEAKING", VALIDATION, MIXER, []),
    ("Cache", "LEAKING", START, MIXER, []),
    ("LateCache", "LEAKING", VALIDATION, "", []),
    ("Counter", "LEAKING", START, MIXER, []),
    *((name, "LEAKING", START, MIXER, []) for name in ("InEvaluation", "InTraining", "Tiny", "BehindZeros", "Store")),
    ("EmbeddingInPlace", "LEAKING", START, MIXER, []),
    ("Hook", "LEAKING", START, f"{MIXER}.linear", []),
    *(
        (name, "LEAKING", START, MIXER, [])
        for name in ("Detached", "Switch", "Sorted", "ShareOfTheSum", "KnowingTheLength")
    ),
    *((name, "LEAKING", START, MIXER, []) for name in ("WrongSoftmax", "MaskOffByOne", "Circular")),
    ("GroupOverTime", "LEAKING", START, f"{MIXER}.norm", []),
    *(
        (name, "LEAKING", START, MIXER, [])
        for name in ("NormOverRows", "RowAbove", "DependingOnTheBatchSize", "PlaceInTheBatch")
    ),
    ("RowsBeyondThree", "LEAKING", START, "", []),  # found among many rows, and located among four
    *((name, "RANDOM", START, MIXER, []) for name in ("Dropping", "DroppingAtOddLengths", "DroppingInLargerBatches")),
    ("DroppingAtTheWindow", "RANDOM", VALIDATION, MIXER, BATCH),
    ("NumpyNoise", "RANDOM", START, MIXER, []),
    ("Overflowing", "NOT FINITE", START, MIXER, []),
    ("NotANumberInEvaluation", "NOT FINITE", START, MIXER, []),
]
SLOTS = [  # key, class, named
    *(("norm", name, "blocks.0.mixer_norm") for name in ("OverTime", "OverRows", "OverBoth", "MovingInEvaluation")),
    ("norm", "BatchStatistics", "blocks.0.mixer_norm"),
    *(("embedding", name, "embedding") for name in ("NextEmbedding", "FromTheEnd", "HashOfTheNext", "MeanEmbedding")),
    *(("head", name, "head") for name in ("MeanHead", "ShiftedHead", "HeadOverTime")),
    *(("stack", name, "stack") for name in ("FeedBack", "ByContent", "SkipFromTheNext")),
    *(("feed_forward", name, "blocks.0.feed_forward") for name in ("TimeFeedForward", "Capacity")),
    ("block", "LeakingResidual", "blocks.0 (LeakingResidual)"),
]
NETWORKS = ["PeekingForward", "PeekingInEvaluation", "RowBelow", "Chosen"]
OBJECTIVES = ["Halved", "Chunked", "Clamped", "ReadsTheTargets", "WritesTheTargets", "WritesTheTokens"]
HONEST = ["RunningMean", "CausalConvolution", "LongConvolution", "LongConvolutionInFloat32", "Recurrence", "Flattening"]
HONEST += ["CountingInTraining", "DroppingWithAllGenerators"]  # of tests/audits/networks.py
LOOKALIKES = [
    "DroppingInExperts",
    "DroppingOfSomeTokens",
    "StochasticDepth",
    "DroppingRows",
    "NoisyRouting",
    "FirstBatch",
]
LOOKALIKES += ["MovingStatistics", "TopOfThePast", "RunningMaximum", "CachedTable", "SlidingWindow", "TwiceReversed"]
LOOKALIKES += ["PaddedTo16", "StraightThrough", "Rotating", "InPlaceOnItsOwn", "InDouble", "Averaged", "Recomputed"]
LOOKALIKES += ["OwnFile", "KeepingItsMap", "Lstm"]
HONEST_MIXERS = [f"tests.audits.networks.{name}" for name in HONEST]
HONEST_MIXERS += [f"{MUTANTS}.honest.{name}" for name in LOOKALIKES]
DECODERS = {  # what of the decoder differs
    "tied": {"tied": True, "dropout": 0.2},
    "soft cap": {"head": {"class_path": "SoftCappedHead", "init_args": {"cap": 5.0}}},
    "several tokens": {"head": {"class_path": "MultiTokenHead", "init_args": {"tokens": 2}}},
    "looped": {"stack": {"class_path": "Looped", "init_args": {"times": 2}}},
}


@pytest.fixture
def laboratory(laboratory):
    laboratory.configure(
        trainer={"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 2},
        data={"window": 16, "batch_size": 8, "val_stride": 8},
    )
    laboratory.config["model"]["network"]["init_args"]["depth"] = 2
    return laboratory


def build(laboratory, block: dict[str, Any] | None = None, **decoder: Any) -> None:
    """Changes the block and the decoder of the config."""
    arguments = laboratory.config["model"]["network"]["init_args"]
    arguments["block"]["init_args"] |= block or {}
    arguments |= decoder
    laboratory.configure()


def assert_refused(laboratory, capsys, verdict: str, moment: str, named: str, flags: list[str]) -> None:
    laboratory.run("fit", "--config", "tiny.yaml", *flags, code=2)
    error = capsys.readouterr().err
    assert f"error: {verdict}{moment or ':'}" in error
    assert named in error
    assert Path("lightning_logs").exists() == bool(moment)
    if moment:
        assert record_of(newest_run())["blind"]["verdict"] == verdict


def assert_honest(laboratory, capsys, *flags: str) -> Path:
    run = laboratory.fit(*flags)
    assert record_of(run)["blind"]["verdict"] in ("identical", "within rounding")
    assert not metrics_of(run)["leaking"]
    assert "blind: " in capsys.readouterr().out.strip().splitlines()[-1]
    return run


@pytest.mark.parametrize(("name", "verdict", "moment", "named", "flags"), MIXERS, ids=lambda x: str(x))
def test_a_mixer_that_cheats_is_refused(laboratory, capsys, name, verdict, moment, named, flags):
    build(laboratory, with_mixer(name))
    assert_refused(laboratory, capsys, verdict, moment, named, flags)


@pytest.mark.parametrize(("key", "name", "named"), SLOTS)
def test_a_cheat_in_another_slot_is_refused(laboratory, capsys, key, name, named):
    if key == "block":
        laboratory.config["model"]["network"]["init_args"]["block"]["class_path"] = slot(name)
        build(laboratory)
    else:
        inside = key in ("norm", "feed_forward")
        build(laboratory, *[{key: slot(name)}] if inside else [], **({} if inside else {key: slot(name)}))
    assert_refused(laboratory, capsys, "LEAKING", START, named, [])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_cheats_is_refused(laboratory, capsys, name):
    laboratory.config["model"]["network"]["class_path"] = f"{MUTANTS}.networks.{name}"
    build(laboratory)
    assert_refused(laboratory, capsys, "LEAKING", START, name, [])


def test_probabilities_that_sum_to_277_are_refused(laboratory, capsys):
    network = {"class_path": f"{MUTANTS}.networks.Generous", "init_args": {"order": 3}}
    laboratory.configure(model={"network": network})
    assert "the probabilities of Generous sum to 277" in laboratory.refusal(capsys, "fit", "--config", "tiny.yaml")


@pytest.mark.parametrize("name", ["ReadsTheText", "ReadsInSilence", "CorpusReader"])
def test_a_component_that_reads_the_corpus_is_refused(laboratory, capsys, name):
    if name == "CorpusReader":
        build(laboratory, with_mixer(name))
    else:
        laboratory.config["model"]["network"]["class_path"] = f"{MUTANTS}.networks.{name}"
        build(laboratory)
    message = laboratory.refusal(capsys, "fit", "--config", "tiny.yaml")
    assert name in message
    assert "opens the corpus corpus.txt" in message.replace(f"{Path.cwd()}/", "")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_falsifies_neither_the_validation_loss_nor_the_training_loss(laboratory, capsys, name):
    laboratory.config["model"]["network"]["class_path"] = f"{MUTANTS}.networks.{name}"
    build(laboratory)
    run = assert_honest(laboratory, capsys)
    model = LanguageModel.load_from_checkpoint(run / "checkpoints/last.ckpt")
    data = TextDataModule(corpus="corpus.txt", window=16, batch_size=8, val_stride=8)
    with torch.no_grad():
        score = Score(model.network.eval())
        losses = torch.cat([score(batch.inputs, batch.targets)[batch.targets >= 0] for batch in data.val_dataloader()])
    assert metrics_of(run)["val/loss"] == pytest.approx(losses.mean().item(), abs=1e-5)  # float32
    curves = curves_of(run)
    if name == "WritesTheTokens":
        assert "train/objective" not in curves
    else:
        pairs = zip(curves["train/loss"], curves["train/objective"], strict=True)
        assert any(loss != objective for (_, loss), (_, objective) in pairs) == (name != "Clamped")
        assert curves["train/loss"][0][1] > 3  # near ln V, the loss of uniform guessing


@pytest.mark.parametrize("name", HONEST_MIXERS)
def test_an_honest_mixer_passes(laboratory, capsys, name):
    build(laboratory, {"mixer": name})
    assert_honest(laboratory, capsys)


@pytest.mark.parametrize("name", DECODERS)
def test_an_honest_decoder_passes(laboratory, capsys, name):
    build(laboratory, **DECODERS[name])
    assert_honest(laboratory, capsys)


def test_a_smoothed_objective_passes(laboratory, capsys):
    laboratory.config["model"]["network"]["class_path"] = f"{MUTANTS}.honest.Smoothed"
    build(laboratory)
    assert_honest(laboratory, capsys)


def test_attention_in_16_bits_passes(laboratory, capsys):
    assert_honest(laboratory, capsys, *BF16)


def test_an_ngram_passes(laboratory, capsys):
    laboratory.configure(model={"network": {"class_path": "NGram", "init_args": {"order": 4}}})
    assert_honest(laboratory, capsys)
