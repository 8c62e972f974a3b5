"""Which parameters weight decay touches."""

from functools import partial

import pytest
from lightning.pytorch import Trainer

from llmx import Decoder, LanguageModel, TextDataModule
from llmx.blocks.mixer_only import MixerOnlyBlock
from llmx.mixers.mamba import Mamba
from llmx.mixers.s4d import S4D


@pytest.mark.parametrize(("mixer", "spared"), [(Mamba, {"decay_log"}), (S4D, {"log_decay", "frequency"})])
def test_matrices_decay_and_vectors_and_rates_do_not(tmp_path, monkeypatch, mixer, spared):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    data = TextDataModule(corpus="corpus.txt", window=8, batch_size=4)
    network = partial(Decoder, dim=8, depth=1, block=partial(MixerOnlyBlock, mixer=mixer))
    model = LanguageModel(network, tokenizer=data.tokenizer, window=data.window)
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(model, datamodule=data)
    decayed = [p for group in trainer.optimizers[0].param_groups if group["weight_decay"] for p in group["params"]]
    for name, parameter in model.network.named_parameters():
        expected = parameter.ndim >= 2 and name.rpartition(".")[2] not in spared
        assert any(parameter is other for other in decayed) == expected, name
