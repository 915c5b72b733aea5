"""`peft-cl train`: learn a task sequence as a configuration file says."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from ..disk import local_path
from ..heads.files import SUMS_FILE
from ..hub import write_model_card
from ..hub.terms import NOT_SETTINGS
from ..plots.run import MATRIX_FILE, PICTURE_FILES
from ..reliability.calibration import CALIBRATION_FILE
from ..scenarios import Scenario
from ..strategies.fine_tuning import BACKBONE_FOLDER
from ..strategies.lora import LORA_FOLDER
from ..text import counted
from ..trainer import ContinualTrainer
from ..trainer.bad_images import BadImageError
from ..trainer.extras import spared
from ..trainer.files import remove
from ..trainer.snapshot import STATE_FOLDER, forget_state
from .adapters import SavedAdapter
from .earlier import load_earlier_test, load_validation
from .errors import CommandError, explained, some
from .folders import image_files
from .given import FILE as GIVEN_FILE
from .given import as_words, recall, remember
from .listing import list_tasks
from .options import apply_overrides
from .output import say
from .sections import ONLY, DatasetSettings
from .settings import SECTIONS, RunSettings, make_settings
from .settings_help import in_lines, settings_help
from .sources import CONFIG_FILE, RESULTS_FILE, WEIGHTS_FILE, load_backbone, load_pair, load_processor
from .summary import going_on, next_commands, summary


CARD_FILE = "README.md"
#: Options without a value, and those with one that are no settings.
FLAGS, OPTIONS = ("--overwrite", "--resume"), ()
#: Sections that the row without prompts has of its own.
OF_THE_METHOD = ("method", "preset", "adapter", "strategy", "augmentation", "output_dir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG.yaml", help="the run; examples/ has some. With --resume also the folder of a run"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace the run that is in the output folder")
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in the output folder after its last task, with its settings",
    )
    parser.add_argument(
        "--continue-from",
        metavar="ADAPTER",
        help="teach a saved adapter (a folder, or its name on the Hub) more tasks; earlier_test in the configuration "
        "names test images of the tasks before, which are measured then",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = in_lines(
        "Any setting may be changed by its dotted name, with a value in YAML: --training.learning_rate 0.01 "
        f"--adapter.layers '[0, 1]' --method coda. Sections: {', '.join(SECTIONS)}."
    )
    parser.epilog += "\n\n" + settings_help()


def run(arguments: argparse.Namespace, overrides: Sequence[tuple[str, Any]], command: str) -> None:
    """Check everything, then train, then write results, card and pictures."""
    overrides = [("continue_from" if key == "continue-from" else key, value) for key, value in overrides]
    config, overrides = recall(arguments.config, overrides, arguments.resume)
    kept = deepcopy(config)
    apply_overrides(config, overrides, SECTIONS)
    earlier = config.get("continue_from")
    settings = make_settings(config, None if earlier is None else SavedAdapter.read(str(earlier)))
    if settings.training.hub_token:  # the record and the card name the command, and are shared
        command = command.replace(settings.training.hub_token, "***")
    refuse_own_source(settings)
    if arguments.resume:
        refuse_without_state(Path(settings.output_dir))
    elif not arguments.overwrite:
        refuse_existing(Path(settings.output_dir))
    trainer = make_trainer(settings)
    if trainer.is_world_process_zero():
        say(f"{describe(settings, trainer)}{list_tasks(trainer.scenario, trainer.args.per_task)}\n", flush=True)
        if arguments.overwrite:
            clear(Path(settings.output_dir))
    if arguments.resume:
        with explained("--resume does not work"):
            trainer.resume(Path(settings.output_dir))
        if trainer.is_world_process_zero():
            say(going_on(trainer), flush=True)
    if trainer.is_world_process_zero():
        remember(Path(settings.output_dir), kept, overrides)
    changes = [(name, value) for name, value in dict(overrides).items() if name.split(".")[0] not in OF_THE_METHOD]
    again = ["peft-cl", "train", arguments.config, *as_words(changes)]
    learn(trainer, lambda: finish(settings, trainer, command, again))


def learn(trainer: ContinualTrainer, finished: Callable[[], str]) -> None:
    """Train, say what `finished` returns, and push."""
    # The Hub gets the finished folder, with card and pictures.
    push, trainer.args.push_to_hub = trainer.args.push_to_hub, False
    try:
        trainer.train()
    except BadImageError as error:
        raise CommandError(str(error).strip().splitlines()[-1]) from error  # of a worker's, the lines before are code
    if trainer.is_world_process_zero():
        say(finished())
    if push:
        with spared("The run is not pushed to the Hub"):
            trainer.push_to_hub()


def refuse_own_source(settings: RunSettings) -> None:
    """Refuse an output folder whose present files the run is made from: it would write over them."""
    output = Path(settings.output_dir).resolve()
    if settings.continue_from and settings.continue_from.folder.resolve() == output:
        what = "the adapter to continue from"
    elif local_path(settings.model.name).resolve() == output / BACKBONE_FOLDER:
        what = "the backbone to train on"
    elif any(lies_in_images(output, each) for each in settings.datasets.values()):
        raise CommandError(
            f"output_dir is {settings.output_dir!r}, which lies in the data: the run's pictures would be taken for "
            "images of it. Give another output_dir."
        )
    else:
        return
    raise CommandError(f"output_dir is {settings.output_dir!r}, which holds {what}. Give another output_dir.")


def lies_in_images(output: Path, data: DatasetSettings) -> bool:
    """Whether a folder lies in one of images that the data set is."""
    folder = local_path(data.path).resolve()
    return folder in (output, *output.parents) and folder.is_dir() and bool(image_files(folder))


def refuse_without_state(folder: Path) -> None:
    """Refuse to begin anew, in the name of going on, over a run whose state is lost."""
    found = [name for name in (RESULTS_FILE, WEIGHTS_FILE) if (folder / name).exists()]
    if found and not (folder / STATE_FOLDER).is_dir():
        raise CommandError(
            f"The output folder {str(folder)!r} holds a run ({', '.join(found)}), but --resume goes on from its state "
            f"({STATE_FOLDER}), and that is gone. Give another output_dir, or --overwrite in the place of --resume to "
            "begin anew."
        )


def refuse_existing(folder: Path) -> None:
    """Refuse to write over the results or the adapter of an earlier run."""
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"output_dir is {str(folder)!r}, but that is a file. Give another name.")
    found = [name for name in (RESULTS_FILE, CONFIG_FILE, WEIGHTS_FILE, STATE_FOLDER) if (folder / name).exists()]
    if found:
        raise CommandError(
            f"The output folder {str(folder)!r} holds a run already ({', '.join(found)}). Give another output_dir, "
            "--resume to go on with it, or --overwrite to replace it."
        )


def clear(folder: Path) -> None:
    """Remove what an earlier run wrote: nothing of it may be taken for the new one's."""
    forget_state(folder)
    for name in (
        RESULTS_FILE,
        CONFIG_FILE,
        WEIGHTS_FILE,
        CARD_FILE,
        SUMS_FILE,
        GIVEN_FILE,
        CALIBRATION_FILE,
        *PICTURE_FILES,
    ):
        (folder / name).unlink(missing_ok=True)
    if (folder / BACKBONE_FOLDER).is_dir() and not (folder / BACKBONE_FOLDER).is_symlink():
        for path in (folder / BACKBONE_FOLDER).iterdir():  # which lie in both places
            (folder / path.name).unlink(missing_ok=True)
    for name in (BACKBONE_FOLDER, LORA_FOLDER):
        remove(folder / name)


def make_trainer(
    settings: RunSettings, scenario: Scenario | None = None, trainer_class: type[ContinualTrainer] = ContinualTrainer
) -> ContinualTrainer:
    """Load data, processor and backbone, and put the trainer together; every fault of the input shows here.

    Args:
        settings: The run.
        scenario: Its tasks, where they are not those of the whole data.
        trainer_class: What the trainer is made of.
    """
    # One process downloads and prepares, the others find it done.
    with settings.training.main_process_first(desc="data and backbone"):
        scenario = scenario or make_scenario(settings)
        model, earlier = settings.model, settings.continue_from
        processor = load_processor(
            (earlier and earlier.processor) or model.name, settings.processor, model.trust_remote_code
        )
        domains = settings.scenario.domain_column or "domain"
        earlier_test = load_earlier_test(settings.earlier_test, earlier, scenario, domains)
        validation = load_validation(settings.datasets, scenario, domains)
        load = earlier.load_base if earlier else load_backbone
        backbone = load(model.name, model.dtype, model.attn_implementation, model.trust_remote_code)
    with explained(f"training.seed is {settings.training.seed}"):
        set_seed(settings.training.seed)  # the adapter's parameters are drawn before the Trainer sets it
    with explained("This run cannot be set up"):
        return trainer_class(
            put_adapter_on(backbone, settings, scenario),
            settings.training,
            scenario,
            processing_class=processor,
            augmentation=settings.augmentation,
            compute_metrics=settings.metrics,
            strategy=settings.strategies,
            earlier_test=earlier_test,
            validation=validation,
        )


def put_adapter_on(backbone: PreTrainedModel, settings: RunSettings, scenario: Scenario) -> PeftModel:
    """A new adapter, or the saved one that is to learn more."""
    if settings.continue_from is None:
        if hasattr(settings.adapter, "set_pool_size"):
            settings.adapter.set_pool_size(len(scenario), len(scenario.classes))
        return get_peft_model(backbone, settings.adapter)
    model = PeftModel.from_pretrained(backbone, str(settings.continue_from.folder), is_trainable=True)
    model.base_model.need_sums()  # now, and not when the first task begins
    # Where its base model lies now, which may be another folder than at the time.
    model.peft_config[model.active_adapter].base_model_name_or_path = backbone.name_or_path
    return model


def make_scenario(settings: RunSettings) -> Scenario:
    data = {name: load_pair(each) for name, each in settings.datasets.items()}
    with explained("The tasks cannot be made"):
        return settings.scenario.make(data, settings.datasets)


def describe(settings: RunSettings, trainer: ContinualTrainer) -> str:
    """Say what is going to be trained, a line for each part."""
    training, scenario = settings.training, trainer.scenario
    facts = scenario.describe()
    trainable, total = trainer.model.get_nb_trainable_parameters()
    method = settings.method
    defaults = method.configure(settings.preset).to_dict() if settings.preset else method.config_class().to_dict()
    changed = {
        name: value
        for name, value in settings.adapter.to_dict().items()
        if name not in NOT_SETTINGS and value != defaults[name]
    }
    learnt = settings.adapter.num_tasks
    known = [name for name in scenario.classes if learnt and name in settings.adapter.classes]
    epochs = (
        counted(training.max_steps, "step") if training.max_steps > 0 else counted(training.num_train_epochs, "epoch")
    )
    order = "in the data's order" if scenario.seed is None else f"in an order drawn with seed {scenario.seed}"
    used = {*scenario.classes, *(settings.adapter.classes or ())}
    left_out = [name for name in scenario.label_names if name not in used]
    measured = [task.name for task in trainer.earlier.tests]
    lines = {
        "method": trainer.results.method + (f", preset {settings.preset}" if settings.preset else ""),
        "adapter": (f"{settings.continue_from.name}, which has learnt {counted(learnt, 'task')}; " if learnt else "")
        + (json.dumps(changed) if changed else "all settings at their defaults"),
        "backbone": f"{settings.model.name}, {settings.model.dtype}, "
        f"{trainer.model.config._attn_implementation} attention",
        "parameters": f"{trainable:,} trainable before the first task, {total:,} in all",
        "data": ", ".join(each.path for each in settings.datasets.values())
        + f", {sum(facts['train_sizes']):,} training and "
        f"{counted(sum(facts['test_sizes']), 'test image')}",
        "tasks": f"{len(scenario)}, {scenario.name}, classes of each: "
        f"{', '.join(map(str, facts['classes_per_task']))}, "
        + ("in the order given" if settings.scenario.class_order or settings.scenario.domain_order else order),
        **({"left out": f"{counted(len(left_out), 'class')} of the data: {some(left_out)}"} if left_out else {}),
        **({"known classes": f"{some(known)}: they are learnt on"} if known else {}),
        **({"tasks before": _of_tasks_before(trainer.earlier.names, measured)} if learnt else {}),
        "augmentation": str(settings.augmentation or "none"),
        "training": f"{epochs} a task, {training.optim.value}, {training.lr_scheduler_type.value} schedule, "
        f"{counted(training.train_batch_size, 'image')} x {training.gradient_accumulation_steps} accumulated x "
        f"{counted(training.world_size, 'process')}",
        "learning rate": settings.learning_rate_note
        + "".join(f", {part} {rate:g}" for part, rate in (training.learning_rates or {}).items()),
        "seed": str(training.seed),
        "output": settings.output_dir,
    }
    return "\n".join(f"{name + ':':<15}{text}" for name, text in lines.items()) + "\n"


def _of_tasks_before(names: Sequence[str], measured: Sequence[str]) -> str:
    if not measured:
        return f"{', '.join(names)}: not measured; earlier_test names test images of them"
    left = [name for name in names if name not in measured]
    return f"{', '.join(measured)} measured" + (f"; not measured: {', '.join(left)}" if left else "")


def finish(settings: RunSettings, trainer: ContinualTrainer, command: str, again: list[str]) -> str:
    """Complete the output folder, and return the summary."""
    folder = Path(settings.output_dir)
    results = trainer.results
    hyperparameters = {
        **results.hyperparameters,
        "backbone_dtype": settings.model.dtype,
        "data": _given(settings.datasets),
        "processor": settings.processor or None,
    }
    results = dataclasses.replace(results, command=command, hyperparameters=hyperparameters)
    results.save(folder)
    written = ["Adapter, results"]
    with spared(f"No model card of {folder}"):
        write_model_card(folder, results, limits=trainer.strategy.limits)
        written.append("model card")
    if trainer.args.pictures and (folder / MATRIX_FILE).is_file():
        written.append("pictures")
    is_frozen = settings.method_name == "frozen" or settings.continue_from is not None
    following = next_commands(
        results, folder, settings.datasets, None if is_frozen else again, settings.scenario.domain_column
    )
    places = f"{' and '.join([', '.join(written[:-1]), written[-1]])} are in {folder}."
    return "\n".join(["", summary(results), places, "", *following])


def _given(datasets: dict[str, DatasetSettings]) -> dict[str, Any]:
    """The settings of the data set, or of several by name, without those that are null."""
    given = {
        name: {key: value for key, value in vars(each).items() if value is not None} for name, each in datasets.items()
    }
    return given.get(ONLY, given)
