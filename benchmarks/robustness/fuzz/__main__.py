"""Bad input by the thousand: random faults in configs, flags, files and checkpoints, each through the command line.

    python -m benchmarks.robustness.fuzz --cases 2000 --out docs/results/fuzz.json

Every case either runs (exit code 0, or 1 where a verb says so) or is refused. A refusal is exit code 2, one message
that names the key or file concerned, no traceback, and nothing new on the disk. Every other outcome is a failure and
printed in full. Networks are tiny and trainings one step, so that valid cases run. Numbers that only mean endless work
(steps, layers) stay small. All other numbers are of any size, under a memory limit.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

from benchmarks.robustness.fuzz.kinds import kinds
from benchmarks.robustness.fuzz.laboratory import FuzzLaboratory, outcomes
from llmx.runs.provenance import provenance


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="number of cases over all kinds")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same cases")
    parser.add_argument("--only", nargs="*", default=[], help="kinds of cases (default: all)")
    parser.add_argument("--out", type=Path, help="JSON file for the counts and the failures")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, FuzzLaboratory(Path(folder)) as lab:
        done = list(outcomes(lab, options.cases, options.seed, options.only))
    counts = {name: Counter(o.what for o in done if o.case.kind == name) for name in kinds(lab.template)}
    print(json.dumps(counts, indent=1))
    failures = [outcome.report() for outcome in done if outcome.failed]
    if options.out is not None:
        record = {
            "date": date.today().isoformat(),
            "cases": len(done),
            "seconds": round(time.perf_counter() - start),
            "outcomes": Counter(outcome.what for outcome in done),
            "by kind": {name: count for name, count in counts.items() if count},
            "failures": failures,
            **provenance(),
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
