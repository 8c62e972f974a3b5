"""What a verb prints at its end: the line with the loss, and generated text."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llmx import display
from llmx.audits.blind import BlindResult
from llmx.cli.resume import Checkpoint
from llmx.data.datamodule import Split, TextDataModule
from llmx.errors import UserError
from llmx.runs.folder import last_checkpoint
from llmx.runs.record import write_predictions
from llmx.training.logger import run_folder
from llmx.training.metrics import bits, perplexity
from llmx.training.module import LanguageModel
from llmx.training.trainer import Trainer


def print_fit(trainer: Trainer, model: LanguageModel, data: TextDataModule) -> None:
    """The final validation loss, and where the checkpoint and the logs are."""
    folder = run_folder(trainer)
    places = []
    if folder is not None:
        last = last_checkpoint(folder)
        places = [*([f"checkpoint {last}"] if last.exists() else []), f"logs {folder}"]
    if trainer.is_global_zero:
        line = " ".join([*_loss(trainer, model, data, "val"), *(f"{place};" for place in places)])
        print(line.rstrip(";"), flush=True)


def print_measured(
    trainer: Trainer, model: LanguageModel, data: TextDataModule, split: Split, checkpoint: Checkpoint | None
) -> None:
    """The loss of a split. Raises UserError where no batch was measured."""
    if f"{split}/loss" not in trainer.callback_metrics:
        raise UserError(f"trainer.limit_{split}_batches: no batch of the {split} split is left to measure")
    chosen = checkpoint is not None and checkpoint.chosen and split == "val"
    if trainer.is_global_zero:
        print(" ".join(_loss(trainer, model, data, split, chosen)), flush=True)


def _loss(
    trainer: Trainer, model: LanguageModel, data: TextDataModule, split: Split, chosen: bool = False
) -> list[str]:
    """The loss as a sentence, after all sentences that qualify it."""
    measured = trainer.callback_metrics.get(f"{split}/loss")
    loss = None if measured is None else measured.item()
    said = []
    seen = data.share_within(split, model.trained_on.get(data.source.sha256, 0.0))
    if loss is not None and seen:
        said.append(f"{display.percent(seen)} of this {split} split is text that its weights were trained on.")
    share = trainer.callback_metrics.get(f"{split}/measured")
    if share is not None and share < 1:
        said.append(f"Only {display.percent(share.item())} of this {split} split was measured.")
    blind = _blind(trainer)
    if model.leaking or (blind is not None and blind.verdict == "LEAKING"):
        said.append("LEAKING: this network sees the future, its numbers mean nothing.")
    if chosen:
        said.append("Its weights were chosen for the lowest loss on a val split, which makes it a little too low.")
    if data.source.substituted:
        said.append(f"Corpus {data.source.name} in place of {data.source.requested}.")
    if loss is not None:
        unit = model.tokenizer.unit
        said.append(
            f"{split} loss {display.loss(loss)} nats per {unit}, perplexity {perplexity(loss):.4f}, "
            f"{bits(loss):.4f} bits per {unit}{_found(blind)}."
        )
    return said


def _blind(trainer: Trainer) -> BlindResult | None:
    """The result of the blind pass, from the metrics: they come back from processes that were forked off."""
    numbers = {
        key.removeprefix("blind/"): value.item()
        for key, value in trainer.callback_metrics.items()
        if key.startswith("blind/")
    }
    return BlindResult.from_numbers(numbers) if numbers else None


def _found(blind: BlindResult | None) -> str:
    """What the blind pass found, to follow the loss."""
    if blind is None:
        return ""
    without = f", loss {display.loss(blind.loss)} when it does not" if blind.verdict == "LEAKING" else ""
    part = "" if blind.share == 1 else f" ({display.percent(blind.share)} of the split)"
    return f", blind: {blind}{without}{part}"


def print_predictions(trainer: Trainer, model: LanguageModel, run: Path, batches: list[Any]) -> None:
    """Writes the samples of all processes into the run's folder, and prints the first one."""
    records = [record for batch in batches for record in batch]
    if dist.is_initialized():
        of_each: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_each, records)
        records = [record for own in of_each for record in own]
    records.sort(key=lambda record: record["prompt_index"])
    if not trainer.is_global_zero or not records:
        return
    written = write_predictions(run, records, asdict(model.sampling))
    print(records[0]["text"])
    print(f"\n{len(records)} samples; {written} and {written.with_suffix('.txt').name}")
