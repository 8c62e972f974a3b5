"""What a user waits for: imports, `--help`, the first optimizer step, the encoding of the corpus.

Commands are timed from start to exit. The first contender of each case is ours. The others are a lower bound (the
import of a library that ours needs) or another way to the same result.

    python -m benchmarks.startup --out docs/results/startup.json
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec

from benchmarks.harness import Case, Contender, Measure, finish, measure_in_turns, parser, run, use_threads

ONE_STEP = {
    "trainer.max_steps": 1,
    "trainer.num_sanity_val_steps": 0,
    "trainer.limit_val_batches": 0,
    "model.compile": False,
}


def prepare_command(arguments: Sequence[str]) -> Measure:
    """Measures the seconds of a Python command."""
    return partial(_seconds, arguments)


def _seconds(arguments: Sequence[str], case: Case) -> float:
    start = time.perf_counter()
    run([sys.executable, *arguments])
    return time.perf_counter() - start


def prepare_import(module: str) -> Measure:
    if find_spec(module.split(".")[0]) is None:
        raise ModuleNotFoundError(name=module)
    return prepare_command(["-c", f"import {module}"])


def prepare_first_step() -> Measure:
    return _first_step


def _first_step(case: Case) -> float:
    with tempfile.TemporaryDirectory() as folder:
        options = {**ONE_STEP, "trainer.default_root_dir": folder}
        flags = [f"--{key}={value}" for key, value in options.items()]
        return _seconds(["main.py", "fit", "--config", "configs/transformer.yaml", *flags], case)


def prepare_encode() -> Measure:
    """Measures characters a second of our tokenizer over the whole corpus."""
    from llmx.data.tokenizers import CharacterTokenizer

    text = _corpus()
    tokenizer = CharacterTokenizer.from_text(text)

    def measure(case: Case) -> float:
        start = time.perf_counter()
        tokenizer.encode(text)
        return len(text) / (time.perf_counter() - start)

    return measure


def prepare_dictionary() -> Measure:
    """Measures the usual way: a dictionary of characters."""
    import numpy as np

    text = _corpus()
    ids = {character: index for index, character in enumerate(sorted(set(text)))}

    def measure(case: Case) -> float:
        start = time.perf_counter()
        np.array([ids[character] for character in text], np.uint8)
        return len(text) / (time.perf_counter() - start)

    return measure


def _corpus() -> str:
    from llmx.data.corpora import load_corpus

    return load_corpus("tinyshakespeare", offline_corpus="stdlib").text


def main() -> int:
    chosen = parser(__doc__).parse_args()
    use_threads(chosen.threads)
    imports = ("llmx", "torch", "lightning.pytorch", "transformers")
    help_of_ours = partial(prepare_command, ["main.py", "--help"])
    groups = [
        (
            Case("import", "s"),
            [Contender(f"import {module}", partial(prepare_import, module)) for module in imports],
        ),
        (
            Case("help", "s"),
            [
                Contender("main.py --help", help_of_ours),
                Contender("import lightning.pytorch.cli", partial(prepare_import, "lightning.pytorch.cli")),
            ],
        ),
        (
            Case("first optimizer step", "s"),
            [Contender("main.py fit, eager, no validation", prepare_first_step, ONE_STEP)],
        ),
        (
            Case("encode the corpus", "characters/s"),
            [Contender("CharacterTokenizer", prepare_encode), Contender("dictionary lookup", prepare_dictionary)],
        ),
    ]
    results = [result for case, contenders in groups for result in measure_in_turns(contenders, [case], chosen.repeats)]
    return finish("start-up", results, chosen)


if __name__ == "__main__":
    sys.exit(main())
