"""The verb `describe`: shows a network and its costs, or makes its config match another one."""

import json
import sys
from typing import Any

import rich
import yaml

from llmx.cli.parser import ParsedCLI
from llmx.cli.preflight import precision
from llmx.cli.resume import Checkpoint
from llmx.config.command import Command
from llmx.config.factories import build, to_config
from llmx.costs.budget import Budget, Plan, budget
from llmx.costs.describe import Description
from llmx.costs.from_config import describe_config
from llmx.costs.matching import match
from llmx.data.datamodule import TextDataModule
from llmx.errors import UserError
from llmx.training.optimizers import parameter_groups


def describe(settings: Any, data: TextDataModule, checkpoint: Checkpoint | None) -> int:
    """Prints the description, or the config that makes the network match that of --to.

    Returns the exit code: 1 where no size or number of steps comes near enough to match. Raises UserError for flags
    that do not go together and for what cannot be described.
    """
    length = data.window if settings.length is None else settings.length
    vocab_size = data.tokenizer.vocab_size if settings.vocab_size is None else settings.vocab_size
    if vocab_size < 1:
        raise UserError(f"vocab_size: {vocab_size} is below 1")
    if settings.match is not None:
        return _match(settings, vocab_size, length)
    if settings.to or settings.by:
        raise UserError(f"{'to' if settings.to else 'by'}: belongs to --match parameters or --match flops")
    model = to_config(settings.model.as_dict())
    description = describe_config(model["network"], vocab_size, length)
    step = _budget(settings, model, description, data, checkpoint)
    if settings.format == "json":
        print(json.dumps(description.to_dict() | ({"step": step.to_dict()} if step else {}), indent=2))
    else:
        rich.print(description.render(), *([step.render()] if step else []), sep="\n")
    return 0


def _budget(
    settings: Any, model: dict[str, Any], description: Description, data: TextDataModule, checkpoint: Checkpoint | None
) -> Budget | None:
    """What a training step costs each device; None without --trainer.devices."""
    trainer = settings.trainer
    if trainer.devices == "auto":
        for name in ("peak_flops", "bandwidth"):
            if settings[name] is not None:
                raise UserError(f"{name}: belongs to --trainer.devices N")
        return None

    return budget(
        lambda: build(model["network"], description.vocab_size, "model.network"),
        lambda network: build(
            model["optimizer"], parameter_groups(network, model["weight_decay_on"]), "model.optimizer"
        ),
        Plan.read(trainer, data.batch_size, str(trainer.precision or precision(trainer.accelerator, checkpoint))),
        description,
        settings.peak_flops,
        settings.bandwidth,
    )


def _match(settings: Any, vocab_size: int, length: int) -> int:
    """Prints the config that makes a network cost as much as another; returns 1 where none comes near enough."""
    if settings.to is None:
        raise UserError("to: not given; name the config to match, --to configs/transformer.yaml")
    if settings.format != "table":
        raise UserError("format: what --match prints is a config, in YAML alone")
    try:
        other = ParsedCLI(Command.read(["describe", "--config", settings.to])).settings
    except UserError as error:
        raise UserError(f"to: {error}") from error
    own, to = (to_config(given.as_dict()) for given in (settings, other))
    own["length"] = length
    to["length"] = to["data"]["window"] if settings.length is None else length
    found = match(own, to, settings.match, settings.by, vocab_size)
    print(f"# {found.said(settings.to)}\n{yaml.safe_dump(found.changes, sort_keys=False)}", end="", flush=True)
    if found.holds:
        return 0
    sys.stderr.write(f"NOT MATCHED, this is the nearest: {found.said(settings.to)}\n")
    return 1
