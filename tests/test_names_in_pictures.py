"""Pictures show names as they are, tasks and numbers alike in all of them, and what fails in drawing fails no run."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager, rc_context
from matplotlib.text import Text
from test_plots import accuracies, cells, run
from trainer_cases import CONFIGS

from peft_cl import RunResults, class_incremental
from peft_cl.cli import main
from peft_cl.metrics import finished_tasks, forgetting
from peft_cl.metrics.matrix import average_accuracies, forgetting_so_far
from peft_cl.plots import (
    plot_accuracy_matrix,
    plot_average_accuracy,
    plot_comparison,
    plot_curves,
    plot_key_similarity,
    plot_prompt_usage,
)
from peft_cl.text import percent


NAMES = [
    "cost $5 and $6",
    r"$\frac$",
    "$a_{$ $",
    r"\$x$y$",
    "_hidden",
    "50% {x:g}",
    r"\textbf{x}",
    "<b>&amp;",
    "日本語",
    "кот",
    "a^b_c",
    "#1",
]


def of_names(names: list[str], **fields) -> RunResults:
    tasks = len(names)
    counts = np.eye(tasks) + 0.5
    return run(names[0], tasks=tasks, task_names=names, dataset=f"owner/{names[-1]}", prompt_usage=counts, **fields)


PICTURES = {
    "matrix": plot_accuracy_matrix,
    "usage": plot_prompt_usage,
    "curves": lambda results, path: plot_curves([results], path=path),
    "comparison": lambda results, path: plot_comparison([results, run("other", tasks=3)], path=path),
    "keys": lambda results, path: plot_key_similarity(
        np.eye(len(results.task_names))[None].repeat(2, 0),
        [1] * len(results.task_names),
        [results.method, "b"],
        results.method,
        path,
        results.task_names,
    ),
}


def texts(figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(Text)}


@pytest.mark.parametrize("plot", PICTURES.values(), ids=PICTURES)
def test_names_are_drawn_as_they_are(plot, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no letter without a glyph is warned of, one by one
        figure = plot(of_names(NAMES), path=tmp_path / "picture.png")
        figure.savefig(tmp_path / "again.svg")  # as a user would who got it returned
    if plot in (plot_accuracy_matrix, plot_prompt_usage, PICTURES["curves"], PICTURES["keys"]):
        assert texts(figure) >= set(NAMES)


@pytest.mark.parametrize("plot", PICTURES.values(), ids=PICTURES)
def test_no_name_fails_a_picture(plot, tmp_path: Path) -> None:
    for first in ("$^$", "\ud800"):  # the one that is also the method's name
        names = [first, "$", "$$", r"$\notacommand$", "$$$$", r"\\", "{", "a\x00b\x07", "\ud801", " ", ""]
        plot(of_names(names), path=tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_settings_of_the_user_make_no_formulas(tmp_path: Path) -> None:
    with rc_context({"text.usetex": True, "text.parse_math": True}):  # there is no LaTeX here
        plot_accuracy_matrix(of_names(NAMES), path=tmp_path / "picture.png")


def test_a_name_is_one_line_and_not_long(tmp_path: Path) -> None:
    figure = plot_accuracy_matrix(of_names(["a\nb\tc", "x\x1b[2J\u202ey", "z" * 1_000_000]))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:2] == ["a b c", "x\\x1b[2J\\u202ey"] and labels[2].startswith("zzz") and len(labels[2]) < 40
    for plot in (PICTURES["comparison"], PICTURES["keys"]):
        plot(of_names(["m" * 1_000_000, "b", "d" * 1_000_000]), path=tmp_path / "picture.png")


def test_an_installed_font_draws_what_the_first_one_lacks(monkeypatch, tmp_path: Path) -> None:
    """DejaVu Sans Mono lacks letters that DejaVu Sans has: the same as a script that only another font has."""
    from peft_cl.plots import figure

    letter = "\u0600"  # any that the mono font lacks
    sans, mono = (font_manager.findfont(name) for name in ("DejaVu Sans", "DejaVu Sans Mono"))
    letter = chr(min(figure._letters_of(sans) - figure._letters_of(mono) - set(range(128))))
    with rc_context({"font.family": "DejaVu Sans Mono"}):
        picture = plot_accuracy_matrix(accuracies(2), task_names=[f"name {letter}", "plain"], path=tmp_path / "p.png")
        first, second = picture.axes[0].get_yticklabels()
        assert first.get_fontfamily()[0] == "DejaVu Sans Mono" and len(first.get_fontfamily()) == 2
        assert ord(letter) in figure._letters_of(font_manager.findfont(first.get_fontfamily()[1]))
        assert second.get_fontfamily() == ["DejaVu Sans Mono"]


# ----------------------------------------------------------------------------------------------- the same everywhere


def test_tasks_are_counted_alike_in_all_pictures() -> None:
    results = run(tasks=3, prompt_usage=np.eye(3) + 1)
    for axes in (
        plot_accuracy_matrix(results).axes[0],
        *plot_curves([results]).axes,
        plot_key_similarity(np.eye(3), [1] * 3, task_names=results.task_names).axes[0],
    ):
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
    assert [label.get_text() for label in plot_prompt_usage(results).axes[0].get_yticklabels()] == ["0", "1", "2"]
    named = plot_average_accuracy([run(task_names=["photo", "art_painting", "sketch"])]).axes[0]
    assert [label.get_text() for label in named.get_xticklabels()] == ["photo", "art_painting", "sketch"]
    # Runs in other orders have no name in common at a place.
    mixed = [run(task_names=["a", "b", "c"]), run("DualPrompt", task_names=["b", "c", "a"])]
    assert [label.get_text() for label in plot_average_accuracy(mixed).axes[0].get_xticklabels()] == ["0", "1", "2"]


def test_tasks_without_names_are_told_by_their_classes() -> None:
    scenario = {"class_order": ["cat", "dog", "$bus$", "car"], "classes_per_task": [2, 2]}
    results = run(tasks=2, scenario=scenario, prompt_usage=[[1, 2]] * 2)
    for plot in (plot_accuracy_matrix, plot_prompt_usage):
        shown = [label.get_text() for label in plot(results).axes[0].get_yticklabels()]
        assert shown == ["0: cat, dog", "1: $bus$, car"]
    shared = run(tasks=2, scenario={"class_order": ["cat"], "classes_per_task": [1, 1]})
    assert [label.get_text() for label in plot_accuracy_matrix(shared).axes[0].get_yticklabels()] == ["0", "1"]


def test_what_was_measured_ahead_is_in_the_matrix() -> None:
    matrix = np.array([[0.9, 0.4, 0.3], [0.7, 0.8, 0.35], [0.6, 0.65, 0.85]])
    results = run(tasks=3, baseline=[0.1, 0.2, 0.25])
    results.accuracy_matrix = matrix.tolist()
    axes = plot_accuracy_matrix(results).axes[0]
    shown = {(row, column): f"{100 * matrix[row, column]:.1f}" for row in range(3) for column in range(3)}
    assert cells(axes) == {**shown, (-1, 0): "10.0", (-1, 1): "20.0", (-1, 2): "25.0"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["before", "0", "1", "2"]


@pytest.mark.parametrize("matrix", [[[0.09]], [[0.09, None], [0.08, 0.1]], accuracies(3)])
def test_colours_go_from_nothing_to_all(matrix) -> None:
    assert plot_accuracy_matrix(matrix).axes[0].images[-1].get_clim() == (0, 1)


def test_numbers_are_rounded_alike_and_never_minus_nothing() -> None:
    # Three ways to the same accuracy, whose last bits differ.
    ways = (0.2175, 0.21749999999999997, np.mean([0.2175 + 1e-17] * 3), 1 - 0.7825)
    assert {percent(way) for way in ways} == {"21.8"}
    assert percent(-1e-9, 2) == "0.00" and percent(-0.004, 2) == "-0.40" and percent(-0.0) == "0.0"
    better = run(tasks=2)
    better.accuracy_matrix = [[0.5, np.nan], [0.5 + 1e-12, 0.5]]
    figure = plot_accuracy_matrix(better)
    assert not any("-0" in text or "\u22120" in text for text in texts(figure))
    assert "-0.0" not in " ".join(texts(plot_curves([better])))


def test_curves_are_the_metrics_of_each_beginning() -> None:
    matrix = accuracies(6, finished=5)
    assert finished_tasks(matrix) == 5
    assert forgetting_so_far(matrix) == [forgetting(matrix[:seen, :seen]) for seen in range(1, 6)]
    assert average_accuracies(matrix) == [matrix[seen, : seen + 1].mean() for seen in range(5)]


# ----------------------------------------------------------------------------------------------- runs do not fail


def test_names_of_money_train_draw_and_resume(make_trainer, data) -> None:
    names = ["$5_$", "$^$", "_x", "<img src=x>", "日本", "a\x1b[2Jb"]
    feature = data["train"].features["label"].__class__(names=names)
    dollars = {split: part.cast_column("label", feature) for split, part in data.items()}
    scenario = class_incremental(dollars, num_tasks=3)
    trainer = make_trainer(CONFIGS["l2p"](), scenario=scenario, max_steps=1, pictures=True)
    trainer.train()
    assert {path.name for path in trainer.folder.glob("*.png")} >= {"accuracy_matrix.png", "prompt_usage.png"}
    make_trainer(CONFIGS["l2p"](), scenario=scenario, max_steps=1, pictures=True).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("fault", ["trainer.write_pictures", "sharing.write_model_card", "push_to_hub"])
def test_what_fails_beside_the_results_fails_no_run(make_trainer, monkeypatch, caplog, fault) -> None:
    def fail(*args, **kwargs):
        raise RuntimeError("a fault\nof two lines")

    trainer = make_trainer(CONFIGS["coda"](), num_tasks=2, max_steps=1, pictures=True)
    if fault == "push_to_hub":
        trainer.args.push_to_hub = True
        monkeypatch.setattr(trainer, fault, fail)
    else:
        monkeypatch.setattr(f"peft_cl.trainer.{fault}", fail)
    trainer.train()
    assert RunResults.load(trainer.folder).finished_tasks == 2
    said = [record.getMessage() for record in caplog.records if "a fault" in record.getMessage()]
    assert said and all("the results are whole: a fault of two lines" in line and "\n" not in line for line in said)


@pytest.mark.parametrize(
    "fault", ["peft_cl.trainer.trainer.write_pictures", "peft_cl.commands.train.write_model_card"]
)
def test_the_command_ends_well_and_its_record_is_whole(train, tmp_path, monkeypatch, capsys, fault) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fault, lambda *args, **kwargs: 1 / 0)
        assert train("--training.max_steps", "1") == 0
    results = RunResults.load(tmp_path / "out")
    assert results.command.startswith("peft-cl train") and results.hyperparameters["data"]
    said = next(line for line in capsys.readouterr().out.splitlines() if "are in" in line)
    assert ("pictures" in said) == ("write_pictures" not in fault)
    assert main(["plot", str(tmp_path / "out")]) == 0
