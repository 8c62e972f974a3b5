"""`sweep`: reads its command line, runs the study, shows the result. Every flag that it does not know goes to `fit`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.config.command import Command
from llmx.errors import ArgumentParser, UserError
from llmx.runs.folder import RUNS
from llmx.sweep.report import Report
from llmx.sweep.space import Space, Values, read_space, with_point

if TYPE_CHECKING:
    from llmx.sweep.study import Execute, Parse


def run(arguments: list[str], execute: Execute, parse: Parse) -> int:
    """Runs the missing trials of the study and shows all trials. Returns the exit code.

    `execute` runs a command of the trainer, such as `fit`; `parse` reads its settings. Raises UserError for wrong
    arguments, or if every trial failed.
    """
    options, others = _parser().parse_known_args(arguments)
    fit = [word for config in options.config or [] for word in ("--config", config)] + others
    for name, given in (("seeds", options.seeds), ("trials", options.trials)):
        if given is not None and given < 1:
            raise UserError(f"{name}: {given} is below 1")
    space, seeds = _space(options)
    points = space.points()
    trials = options.trials or space.trials
    if points is None and trials is None:
        raise UserError("trials: a range has no last combination; give their number, --trials 20")
    trainer = _trainer_settings(fit, space, parse)
    try:
        from llmx.sweep.study import Sweep, open_storage
    except ImportError as error:
        if error.name != "optuna":
            raise
        raise UserError("sweep: Optuna is not installed; pip install -e '.[sweep]'") from None
    name = options.study or "-".join(Path(x).stem for x in (*(options.config or []), options.sweep or "seeds"))
    sweep = Sweep(
        name=name,
        storage=open_storage(options.storage or _default_storage(trainer.default_root_dir)),
        space=space,
        points=points if trials is None else None,
        wanted=trials,
        prune=(trials is not None) if space.prune is None else space.prune,
        seeds=seeds,
        fit=[*fit, "--trainer.devices", "1"] if trainer.devices == "auto" else fit,
        identity={"space": space.to_dict(), "seeds": seeds, "settings": Command.read(["fit", *fit]).words()[1:]},
        execute=execute,
        say=partial(print, flush=True, file=sys.stderr if options.format == "json" else sys.stdout),
    )
    try:
        sweep.run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues the study\n")
        return 130
    report = Report(name, space, sweep.trials(), command=["python", "main.py", "fit", *fit], means=not options.sweep)
    report.show(options.format)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="main.py sweep",
        description="Repeats fit over a search space, or over seeds. Any further flag is one of fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", "-c", action="append", help="The config that every trial starts from.")
    parser.add_argument("--sweep", help="The search space: a YAML file, see configs/sweeps/.")
    parser.add_argument("--seeds", type=int, help="Repeat each configuration over the seeds 1 to this, for their mean.")
    parser.add_argument("--trials", type=int, help="How many configurations to try; default: all, if they are finite.")
    parser.add_argument("--storage", help=f"The database that processes share; default: {RUNS}/sweeps.db.")
    parser.add_argument("--study", help="The study's name in the database; default: from the names of the files.")
    parser.add_argument("--format", choices=["table", "json"], default="table", help="How to show the result.")
    return parser


def _space(options: argparse.Namespace) -> tuple[Space, list[int] | None]:
    """The space, and the seeds of each of its points. Without a space file, the seeds are the space."""
    seeds = None if options.seeds is None else list(range(1, options.seeds + 1))
    if options.sweep is not None:
        return read_space(options.sweep), seeds
    if seeds is not None:
        return Space({"seed_everything": Values(tuple(seeds))}), None
    raise UserError("sweep: give --sweep FILE (such as configs/sweeps/learning_rate.yaml), or --seeds 5")


def _trainer_settings(fit: list[str], space: Space, parse: Parse) -> Any:
    """The trainer's settings as `fit` parses them; reading them first means that a mistake leaves no study behind.

    Raises UserError for unknown keys, and for settings that a sweep does not support.
    """
    first = {key: d.values[0] if isinstance(d, Values) else d.low for key, d in space.dimensions.items()}
    command = Command.read(with_point(["fit", *fit], first))
    if command.flag("--ckpt_path") is not None:
        raise UserError("ckpt_path: a sweep's runs are new ones; --model.warm_start begins them with a run's weights")
    trainer = parse(command).trainer
    devices = trainer.devices
    if str(devices) not in ("auto", "1") and not (isinstance(devices, list) and len(devices) == 1):
        raise UserError(f"trainer.devices: {devices}, but a sweep trains on one; start a process for each device")
    return trainer


def _default_storage(root: str | None) -> str:
    folder = Path(root or ".") / RUNS
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'sweeps.db'}"
