"""What a user waits for first: the command's help, the import, and what comes before the first step of a run.

    python benchmarks/start_up.py --json benchmarks/results/cpu/start_up.json
    python benchmarks/start_up.py --data DATA/tiny-imagenet-cl --json ...    # the run on real images

Each line is a process of its own, started anew; the median of the repetitions. The first run of all, which reads
everything from the disk, is not counted. `--limits` fails where a bound is not kept: 0.3 s for the help, and
0.2 s for `import peft_cl` beyond `import peft, transformers`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


HELP, IMPORT = 0.3, 0.2
#: Both imports in one process: from one process to the next the large one varies by more than the small one takes.
IMPORTS = """
import time
began = time.perf_counter()
import peft, transformers
between = time.perf_counter()
import peft_cl
print(between - began, time.perf_counter() - between)
"""
#: A run until its first step; it prints what it has reached, and when.
RUN = """
import sys, time

def reached(name):
    print(name, time.time(), flush=True)

from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback

from peft_cl import ContinualTrainer, ContinualTrainingArguments, CodaPromptConfig, class_incremental
from peft_cl.assets import default_backbone
from peft_cl.commands.digits import draw_digits_dataset

reached("imports")
data = load_dataset(sys.argv[1]) if len(sys.argv) > 1 else draw_digits_dataset(per_digit=100)
scenario = class_incremental(data, num_tasks=5)
reached("data")
model = AutoModelForImageClassification.from_pretrained(default_backbone(), dtype="float32")
model = get_peft_model(model, CodaPromptConfig.from_preset("best"))
reached("backbone and adapter")

class First(TrainerCallback):
    begun = False

    def on_train_begin(self, *args, **kwargs):
        reached("queries and checks")

    def on_step_begin(self, *args, **kwargs):
        if not self.begun:
            reached("first batch")
        self.begun = True

    def on_step_end(self, args, state, control, **kwargs):
        reached("first step")
        control.should_training_stop = True

trainer = ContinualTrainer(
    model,
    ContinualTrainingArguments("out", report_to="none", disable_tqdm=True, use_cpu=True),
    scenario,
    processing_class=AutoImageProcessor.from_pretrained(default_backbone()),
    callbacks=[First],
)
reached("trainer")
trainer.train_task(scenario[0])
"""


def seconds(command: list[str]) -> float:
    """Of a process from its start to its end."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def parts_of_a_run(data: Path | None) -> dict[str, float]:
    """Seconds from the start of the process to each thing reached."""
    began = time.time()
    command = [sys.executable, "-W", "ignore", "-c", RUN, *([str(data.resolve())] if data else [])]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
    lines = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    known = ("imports", "data", "backbone and adapter", "trainer", "queries and checks", "first batch", "first step")
    return {name: float(when) - began for name, when in (line for line in lines if line[0] in known)}


def measure(repeats: int, data: Path | None) -> dict[str, Any]:
    command = str(Path(sys.executable).with_name("peft-cl"))
    commands = {"peft-cl --version": [command, "--version"], "peft-cl --help": [command, "--help"]}
    names = ("import peft, transformers", "import peft_cl, beyond that")
    times: dict[str, list[float]] = {name: [] for name in (*commands, *names)}
    runs = []
    for repeat in range(repeats + 1):
        for name, words in commands.items():
            times[name].append(seconds(words))
        imports = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
        for name, value in zip(names, imports.stdout.split(), strict=True):
            times[name].append(float(value))
        if repeat:
            runs.append(parts_of_a_run(data))
        print(f"repetition {repeat} of {repeats} done", file=sys.stderr, flush=True)
    found = {name: statistics.median(values[1:]) for name, values in times.items()}
    reached = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {"seconds": found, "run": reached, "data": data.name if data else "drawn digits", "repeats": repeats}


def table(record: dict[str, Any]) -> str:
    lines = ["| What | Seconds |", "|---|---:|"]
    lines += [f"| `{name}` | {value:.2f} |" for name, value in record["seconds"].items()]
    before = 0.0
    for name, value in record["run"].items():
        lines.append(f"| a run on {record['data']}: {name} | {value - before:.2f} |")
        before = value
    return "\n".join(lines)


def over(record: dict[str, Any]) -> list[str]:
    """The bounds that are not kept."""
    found = record["seconds"]
    extra = found["import peft_cl, beyond that"]
    wrong = [
        f"{name} takes {found[name]:.2f} s" for name in ("peft-cl --version", "peft-cl --help") if found[name] > HELP
    ]
    return wrong + ([f"import peft_cl takes {extra:.2f} s more"] if extra > IMPORT else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", type=Path, help="a folder of parquet files; default: digits that are drawn")
    parser.add_argument("--limits", action="store_true", help="fail where a bound is not kept")
    parser.add_argument("--json", type=Path, help="write the record into this file")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has been compiled
    record = measure(options.repeats, options.data)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    if options.limits and over(record):
        raise SystemExit("; ".join(over(record)))


if __name__ == "__main__":
    main()
