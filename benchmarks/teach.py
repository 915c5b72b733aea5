"""Classes taught from a handful of images, without training: time, accuracy on them, and what becomes of the others.

    python benchmarks/teach.py --data DATA/tiny-imagenet-cl --output benchmarks/results/teach
    python benchmarks/teach.py --table --data ... --output ...    # only print what is there

An adapter learns the first tasks of a sequence; the classes of the next one are then taught to it one after the other
by `peft_cl.serving.Session.teach`, from the first few of their training images. For comparison the same classes are
shown to the same adapter with all of their training images. Accuracies are of test images, each with all classes known
in question. What has been measured is kept in `--output`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from head_features import METHODS, column, method_of
from heads import spread
from peft import get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from peft_cl import ContinualTrainer, ContinualTrainingArguments, class_incremental
from peft_cl.assets import default_backbone
from peft_cl.serving import Session


def learn(name: str, seed: int, data: Any, options: argparse.Namespace, folder: str) -> ContinualTrainer:
    """A trainer that has learnt the first tasks."""
    set_seed(seed)
    method, backbone = method_of(name), default_backbone()
    model = AutoModelForImageClassification.from_pretrained(backbone, dtype="float32")
    scenario = class_incremental(data, options.num_tasks, seed=seed)
    trainer = ContinualTrainer(
        get_peft_model(model, method.config.from_preset("best", **method.settings)),
        ContinualTrainingArguments(
            folder,
            num_train_epochs=options.epochs or method.epochs,
            per_device_train_batch_size=25,
            per_device_eval_batch_size=100,
            learning_rate=1e-3,
            learning_rates={"pool": method.rate} if method.rate else None,
            lr_scheduler_type="constant",
            seed=seed,
            use_cpu=not torch.accelerator.is_available(),
            disable_tqdm=True,
            report_to="none",
            pictures=False,
        ),
        scenario.with_images_per_class(options.images_per_class, seed),
        processing_class=AutoImageProcessor.from_pretrained(backbone),
    )
    trainer.evaluate = lambda *words, **more: {}  # measured below
    for task in list(trainer.scenario)[: options.learnt_tasks]:
        trainer.train_task(task)
    return trainer


class Tested:
    """Features of the test images of some tasks, and the rows of their classes."""

    def __init__(self, trainer: ContinualTrainer, tasks: list[Any]):
        seen = [
            trainer.tuner.features(batch["pixel_values"])
            for task in tasks
            for batch in trainer.plain_batches(task, "test")
        ]
        self.features = torch.cat([features for features, _ in seen])
        self.query = None if seen[0][1] is None else torch.cat([query for _, query in seen])
        self.labels = torch.cat([torch.from_numpy(trainer.scenario.model_labels(task, "test")) for task in tasks])

    @torch.no_grad()
    def accuracy(self, session: Session, rows: range) -> float:
        """Of the images of these rows' classes."""
        own = (self.labels >= rows.start) & (self.labels < rows.stop)
        logits = session.tuner.head.active(self.features[own], None if self.query is None else self.query[own])
        return (logits.argmax(-1) == self.labels[own]).float().mean().item()


def teach_all(session: Session, tested: list[Tested], images: dict[str, list], known: int) -> dict:
    """Teach the classes one after the other, and measure."""
    seconds, at_once = [], []
    for number, (name, own) in enumerate(images.items()):
        began = time.process_time()  # of all threads: another program beside this one does not count
        session.teach(name, own)
        seconds.append(time.process_time() - began)
        at_once.append(tested[1].accuracy(session, range(known + number, known + number + 1)))
    return {
        "seconds": seconds,
        "at_once": fmean(at_once),
        "taught": tested[1].accuracy(session, range(known, known + len(images))),
        "others": tested[0].accuracy(session, range(known)),
    }


def measure(name: str, seed: int, data: Any, options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer = learn(name, seed, data, options, folder)
    scenario = trainer.scenario
    learnt, next_task = list(scenario)[: options.learnt_tasks], scenario[options.learnt_tasks]
    session = Session(trainer.model, trainer.processing_class)
    known = len(session.classes)
    tested = [Tested(trainer, learnt), Tested(trainer, [next_task])]
    labels = scenario.model_labels(next_task, "train")
    images = {
        each: next_task.train.select(np.flatnonzero(labels == known + number))[scenario.image_column]
        for number, each in enumerate(next_task.classes)
    }
    record = {"classes": known, "before": tested[0].accuracy(session, range(known))}
    few = {each: list(own)[: options.shots] for each, own in images.items()}
    record["few"] = teach_all(session, tested, few, known)
    for _ in few:
        session.undo()
    record["after_undo"] = tested[0].accuracy(session, range(known))
    record["all"] = teach_all(session, tested, {each: list(own) for each, own in images.items()}, known)
    return {**record, "shots": options.shots, "images_per_class": options.images_per_class, "threads": options.threads}


def table(options: argparse.Namespace) -> str:
    lines = [
        "| Adapter | Classes before | Taught from | CPU seconds a class | Taught classes | ... right after its lesson "
        "| Others before | Others after |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in options.methods:
        paths = [options.output / f"{name}-seed{seed}.json" for seed in options.seeds]
        records = [json.loads(path.read_text()) for path in paths if path.is_file()]
        for part in ("few", "all") if records else ():
            found = [record[part] for record in records]
            count = records[0]["shots" if part == "few" else "images_per_class"]
            cells = [
                method_of(name).title,
                str(records[0]["classes"]),
                f"{count} images",
                f"{median(value for each in found for value in each['seconds']):.2f}",
                *(spread([100 * each[what] for each in found]) for what in ("taught", "at_once")),
                spread([100 * record["before"] for record in records]),
                spread([100 * each["others"] for each in found]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder or Hub name of an image data set")
    parser.add_argument("--output", type=Path, required=True, help="the records go there")
    parser.add_argument("--methods", nargs="+", type=column, default=["none", "coda"], help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the class order and the training")
    parser.add_argument("--num-tasks", type=int, default=10, help="tasks that the data is divided into")
    parser.add_argument("--learnt-tasks", type=int, default=5, help="tasks that are learnt; the next one is taught")
    parser.add_argument("--images-per-class", type=int, default=100, help="training images of each class")
    parser.add_argument("--shots", type=int, default=5, help="images that a class is taught from")
    parser.add_argument("--epochs", type=int, help="of each task; each method has its own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only print the table of what was measured")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = None if options.table else load_dataset(options.data)
    for name in options.methods if data else ():
        for seed in options.seeds:
            path = options.output / f"{name}-seed{seed}.json"
            if not path.is_file():
                record = measure(name, seed, data, options)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record, indent=1) + "\n")
                print(f"{name} seed {seed}: {100 * record['few']['taught']:.2f}", flush=True)
    print(table(options))


if __name__ == "__main__":
    main()
