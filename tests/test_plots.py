"""The pictures show the numbers they are made from, whole and legible."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from peft_cl.metrics import RunResults, continual_metrics, forgetting
from peft_cl.plots import (
    plot_accuracy_matrix,
    plot_average_accuracy,
    plot_comparison,
    plot_curves,
    plot_forgetting,
    plot_key_similarity,
    plot_prompt_usage,
)


def accuracies(tasks: int, finished: int | None = None, seed: int = 0) -> np.ndarray:
    """A plausible accuracy matrix: tasks fade while later ones are learnt."""
    noise = np.random.default_rng(seed).uniform(-0.03, 0.03, (tasks, tasks))
    row, column = np.indices((tasks, tasks))
    matrix = 0.85 - 0.3 * (row - column) / tasks + noise
    return np.where((column <= row) & (row < (tasks if finished is None else finished)), matrix, np.nan)


def run(method: str = "L2P", tasks: int = 3, seed: int = 0, finished: int | None = None, **fields) -> RunResults:
    matrix = accuracies(tasks, finished, seed)
    defaults = {
        "peft_type": "L2P",
        "base_model": "owner/backbone",
        "dataset": "owner/images",
        "scenario": {},
        "task_names": [f"task_{index}" for index in range(tasks)],
        "test_sizes": [50] * tasks,
        "metrics": {} if finished == 0 else continual_metrics(matrix),
        "trainable_parameters": 1,
        "total_parameters": 2,
        "adapter_bytes": None,
        "train_seconds": 1.0,
        "finished_tasks": tasks if finished is None else finished,
    }
    return RunResults(method=method, seed=seed, accuracy_matrix=matrix, **{**defaults, **fields})


def cells(axes) -> dict[tuple[int, int], str]:
    """The text in each cell, by (row, column)."""
    texts = [text for text in axes.texts if not hasattr(text, "arrow_patch")]  # an annotation is no cell
    return {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in texts}


def heading(figure: Figure) -> str:
    axes = figure.axes[0]
    below = [text.get_text() for text in axes.texts if hasattr(text, "arrow_patch")]
    return " ".join([axes.get_title(loc="left"), *below]).replace("\n", " ").replace("\u00a0", " ")


def end_labels(axes) -> list:
    return [text for text in axes.texts if text.get_fontweight() == "bold"]


@pytest.mark.parametrize("tasks", [1, 2, 10, 20])
def test_cells_show_the_accuracies_of_the_tasks_seen(tasks: int) -> None:
    matrix = accuracies(tasks)
    texts = cells(plot_accuracy_matrix(matrix).axes[0])
    assert texts == {
        (row, column): f"{100 * matrix[row, column]:.1f}" for row in range(tasks) for column in range(row + 1)
    }


def test_beyond_twenty_tasks_there_are_colours_only() -> None:
    axes = plot_accuracy_matrix(accuracies(21)).axes[0]
    assert cells(axes) == {}
    np.testing.assert_array_equal(axes.images[-1].get_array().filled(np.nan), accuracies(21))


def test_forward_transfer_above_the_diagonal_is_not_drawn() -> None:
    assert set(cells(plot_accuracy_matrix([[0.9, 0.4], [0.7, 0.8]]).axes[0])) == {(0, 0), (1, 0), (1, 1)}


def test_heading_names_the_run_and_its_metrics() -> None:
    results = run("CODA-Prompt", tasks=4)
    text = heading(plot_accuracy_matrix(results))
    metrics = results.metrics
    assert text == (
        f"CODA-Prompt on images average accuracy {100 * metrics['average_accuracy']:.1f} %, "
        f"forgetting {100 * metrics['forgetting']:.1f} %"
    )


def test_unfinished_run_says_so_and_leaves_its_cells_empty() -> None:
    figure = plot_accuracy_matrix(run(tasks=4, finished=2))
    assert set(cells(figure.axes[0])) == {(0, 0), (1, 0), (1, 1)}
    assert "(after 2 of 4 tasks)" in heading(figure)
    assert "none of 4 tasks finished" in heading(plot_accuracy_matrix(run(tasks=4, finished=0)))


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (None, ["0", "1", "2"]),
        (["step 1", "step 2", "step 3"], ["1", "2", "3"]),
        (["photo", "art_painting", "sketch"], ["photo", "art_painting", "sketch"]),
        (["task", "task", "task"], ["task", "task", "task"]),
    ],
)
def test_task_names_label_both_axes(names: list[str] | None, shown: list[str]) -> None:
    axes = plot_accuracy_matrix(accuracies(3), task_names=names).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == shown
    assert [label.get_text() for label in axes.get_yticklabels()] == shown


@pytest.mark.parametrize(
    ("matrix", "names", "message"),
    [
        ([[0.5, 0.5]], None, "shape"),
        ([[50.0]], None, "divide percentages by 100"),
        ([[0.5]], ["a", "b"], "2 task names for an accuracy matrix of 1 task"),
    ],
)
def test_what_is_no_accuracy_matrix_is_refused(matrix: list, names: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_accuracy_matrix(matrix, task_names=names)


def test_seeds_become_a_mean_with_a_band_of_their_deviation() -> None:
    runs = [run("L2P", 5, seed) for seed in range(3)] + [run("DualPrompt", 5, seed=0)]
    axes = plot_average_accuracy(runs).axes[0]
    curves = np.array([[100 * accuracies(5, seed=seed)[i, : i + 1].mean() for i in range(5)] for seed in range(3)])
    line, single = axes.get_lines()
    np.testing.assert_allclose(line.get_ydata(), curves.mean(axis=0))
    np.testing.assert_allclose(single.get_ydata(), curves[0])
    (band,) = axes.collections  # one run has none
    at_the_end = [y for x, y in band.get_paths()[0].vertices if x == 5]
    deviation = curves[:, -1].std(ddof=1)
    np.testing.assert_allclose(
        [min(at_the_end), max(at_the_end)], [curves[:, -1].mean() - deviation, curves[:, -1].mean() + deviation]
    )
    assert {label.get_text() for label in end_labels(axes)} == {
        f"L2P  {curves[:, -1].mean():.1f}",
        f"DualPrompt  {curves[0, -1]:.1f}",
    }


def test_unfinished_seed_ends_the_mean_where_it_ends() -> None:
    axes = plot_average_accuracy([run(tasks=5, seed=0), run(tasks=5, seed=1, finished=3)]).axes[0]
    np.testing.assert_array_equal(np.isfinite(axes.get_lines()[0].get_ydata()), [True, True, True, False, False])


def test_forgetting_is_drawn_from_the_second_task_on() -> None:
    # After two tasks 0.8 - 0.9; after three task 0 has lost 0.9 - 0.5 and task 1 0.6 - 0.4.
    matrix = [[0.8, np.nan, np.nan], [0.9, 0.6, np.nan], [0.5, 0.4, 0.7]]
    results = run()
    results.accuracy_matrix = matrix
    axes = plot_forgetting([results]).axes[0]
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), [np.nan, -10, 30])
    assert axes.get_ylim()[0] < -10
    assert [label.get_text() for label in end_labels(axes)] == ["L2P  30.0"]
    empty = plot_forgetting([run(finished=1)]).axes[0]
    assert any("before the second task is finished" in text.get_text() for text in empty.texts)


def test_curves_of_several_runs_are_in_one_picture() -> None:
    runs = [run(method, 6, seed) for method in ("L2P", "DualPrompt") for seed in range(2)]
    above, below = plot_curves(runs).axes
    assert above.get_title(loc="left") == "Average accuracy over the tasks seen"
    assert below.get_title(loc="left") == "Forgetting over the tasks seen"
    np.testing.assert_allclose(
        below.get_lines()[0].get_ydata()[-1],
        50 * sum(forgetting(accuracies(6, seed=seed)) for seed in range(2)),
    )
    for axes in (above, below):
        assert [line.get_label() for line in axes.get_lines()] == ["L2P", "DualPrompt"]
        assert {label.get_text().split("  ")[0] for label in end_labels(axes)} == {"L2P", "DualPrompt"}
        assert axes.get_xlim() == above.get_xlim() and len(axes.collections) == 2  # a band for each


def test_what_differs_between_lines_of_one_method_is_named() -> None:
    figure = plot_average_accuracy([run(tasks=5), run(tasks=10)])
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["L2P (5 tasks)", "L2P (10 tasks)"]
    figure = plot_average_accuracy([run(), run(dataset="owner/paintings")])
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["L2P (images)", "L2P (paintings)"]


def test_runs_with_other_settings_are_no_seeds_of_one_line() -> None:
    class_incremental, task_incremental = ({"name": f"{kind}-incremental"} for kind in ("class", "task"))
    slow, fast = {"learning_rate": 0.02}, {"learning_rate": 0.5}

    def labels(*runs: RunResults) -> list[str]:
        axes = plot_average_accuracy(runs).axes[0]
        assert not axes.collections  # no band: each line is one run
        return [line.get_label() for line in axes.get_lines()]

    unlike = run(seed=1, scenario=task_incremental, hyperparameters=fast)
    first = run(scenario=class_incremental, hyperparameters=slow)
    assert labels(first, unlike) == ["L2P (class-incremental)", "L2P (task-incremental)"]
    runs = [run(hyperparameters=slow), run(seed=1, hyperparameters=fast), run("DualPrompt", hyperparameters=fast)]
    assert labels(*runs) == ["L2P (learning_rate 0.02)", "L2P (learning_rate 0.5)", "DualPrompt"]
    runs.append(run(tasks=5, hyperparameters=fast))
    assert labels(*runs) == [
        "L2P (3 tasks, learning_rate 0.02)",
        "L2P (3 tasks, learning_rate 0.5)",
        "DualPrompt (3 tasks)",
        "L2P (5 tasks)",
    ]
    assert labels(run(dataset="a/images"), run(dataset="b/images")) == [
        "L2P (dataset a/images)",
        "L2P (dataset b/images)",
    ]


def test_labels_of_close_curves_do_not_overlap() -> None:
    runs = [run(f"A method with quite a long name {number}", tasks=10) for number in range(9)]
    figure = plot_average_accuracy(runs)
    figure.draw_without_rendering()
    # Of the text alone: an annotation's own extent has its line as well.
    boxes = sorted((Text.get_window_extent(label) for label in end_labels(figure.axes[0])), key=lambda box: box.y0)
    assert len(boxes) == 9
    assert all(lower.y1 <= upper.y0 for lower, upper in zip(boxes, boxes[1:], strict=False))


def test_comparison_shows_each_method_on_one_scale() -> None:
    runs = [run(method, 4, seed) for method in ("L2P", "DualPrompt", "CODA-Prompt") for seed in range(2)]
    panels = [axes for axes in plot_comparison(runs).axes if axes.images]
    assert [axes.get_title(loc="left") for axes in panels] == ["L2P", "DualPrompt", "CODA-Prompt"]
    mean = (accuracies(4, seed=0) + accuracies(4, seed=1)) / 2
    for axes in panels:
        np.testing.assert_allclose(axes.images[-1].get_array().filled(np.nan), mean)
        assert axes.images[-1].get_clim() == panels[0].images[-1].get_clim()
        assert cells(axes)[3, 0] == f"{100 * mean[3, 0]:.1f}"


def test_comparison_averages_forgetting_over_the_seeds() -> None:
    """The forgetting of the mean matrix would be another number."""
    runs = [run(tasks=8, seed=seed) for seed in range(3)]
    mean_forgetting = 100 * np.mean([forgetting(results.accuracy_matrix) for results in runs])
    (panel,) = (axes for axes in plot_comparison(runs).axes if axes.images)
    assert any(f"forg. {mean_forgetting:.1f}\u00a0%" in text.get_text() for text in panel.texts)


def test_prompt_usage_shows_shares_and_entropy() -> None:
    axes, bars, scale = plot_prompt_usage([[3, 1, 0, 0], [2, 2, 2, 2]], task_names=["photo", "sketch"]).axes
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25, 0, 0], [0.25] * 4])
    assert [cells(axes)[0, row] for row in range(4)] == ["75", "25", "0", "0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["photo", "sketch"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3"]
    # 3/4 log2(4/3) + 1/4 log2(4) = 0.811 bits, and all four rows alike: log2(4)
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], [0.75 * np.log2(4 / 3) + 0.5, 2])
    assert bars.get_xlim() == (0, 2)
    assert [text.get_text() for text in bars.texts] == ["0.8", "2.0"]
    assert [label.get_text() for label in scale.get_yticklabels()] == ["0 %", "38 %", "75 %"]


def test_prompt_usage_of_a_run_names_it_and_its_finished_tasks() -> None:
    figure = plot_prompt_usage(run(tasks=3, finished=2, prompt_usage=[[3, 1, 0], [1, 3, 0]]))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "1"]
    assert "L2P on images: prompt usage" in heading(figure)
    assert "two tasks have 50 % in common on average" in heading(figure)


def test_a_large_pool_has_colours_only_and_few_ticks() -> None:
    axes, bars, _ = plot_prompt_usage(np.ones((10, 100))).axes
    assert cells(axes) == {} and len(bars.texts) == 10
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(row) for row in range(0, 100, 10)]


@pytest.mark.parametrize(
    ("counts", "names", "message"),
    [
        (run(), None, "'L2P' have no prompt_usage: all rows take part"),
        ([[1, -1]], None, "numbers from 0, got -1.0"),
        ([[1, 2]], ["a", "b"], "2 task names for counts of 1 tasks"),
    ],
)
def test_what_is_no_prompt_usage_is_refused(counts, names, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_prompt_usage(counts, task_names=names)


def test_keys_are_compared_by_their_cosine() -> None:
    axes = plot_key_similarity([[2, 0], [3, 3], [0, -1]]).axes[0]
    half = np.sqrt(0.5)
    np.testing.assert_allclose(axes.images[0].get_array(), [[1, half, 0], [half, 1, -half], [0, -half, 1]], atol=1e-12)
    assert axes.images[0].get_clim() == (-1, 1)
    assert cells(axes)[0, 1] == "0.71" and cells(axes)[2, 1] == "-0.71"
    assert axes.get_ylabel() == "Key, row of the pool"
    below = [text.get_text() for text in axes.texts if hasattr(text, "arrow_patch")]
    assert below == ["two keys: \u22120.71 to 0.71, mean 0.00"]


def test_rows_of_tasks_are_marked() -> None:
    axes = plot_key_similarity(np.eye(6), rows_of_tasks=[3, 1, 2]).axes[0]
    assert axes.get_xticks().tolist() == axes.get_yticks().tolist() == [1, 3, 4.5]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
    across = [line.get_ydata()[0] for line in axes.get_lines() if line.get_ydata()[0] == line.get_ydata()[1]]
    assert across == [2.5, 3.5]
    assert axes.get_ylabel() == "Keys of task"
    assert plot_key_similarity(np.eye(6), rows_of_tasks=[1] * 6).axes[0].get_lines()[:] == []


def test_each_set_of_keys_has_a_panel_on_one_scale() -> None:
    keys = np.random.default_rng(0).normal(size=(5, 100, 8))
    figure = plot_key_similarity(keys, [10] * 10, [f"layer {layer}" for layer in range(5)], heading="CODA-Prompt")
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left") for axes in panels] == [f"layer {layer}" for layer in range(5)]
    assert figure.get_suptitle() == "CODA-Prompt"
    for axes in panels:
        assert axes.images[0].get_clim() == (-1, 1) and cells(axes) == {} and len(axes.get_xticks()) == 10


def test_a_key_without_direction_is_left_out() -> None:
    axes = plot_key_similarity([[1, 0], [0, 0], [1, 1], [np.inf, 1]]).axes[0]
    missing = axes.images[0].get_array().mask
    assert missing[1].all() and missing[3].all() and missing[:, 1].all() and not missing[0, 2]
    assert set(cells(axes)) == {(0, 0), (0, 2), (2, 0), (2, 2)}


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        ([1.0, 2.0], {}, r"the shape \(2,\), but must have \(rows, D\)"),
        (np.zeros((1, 0, 4)), {}, r"the shape \(1, 0, 4\)"),
        (np.eye(3), {"rows_of_tasks": [1, 1]}, r"rows_of_tasks is \[1, 1\], but there are 3 keys"),
        (np.eye(3), {"rows_of_tasks": [3, 0]}, "from 1"),
        (np.eye(3), {"set_names": ["a", "b"]}, "2 set names for 1 sets"),
    ],
)
def test_what_are_no_keys_is_refused(keys, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_key_similarity(keys, **options)


@pytest.mark.parametrize("plot", [plot_average_accuracy, plot_comparison, plot_curves])
def test_lists_of_results_that_cannot_be_drawn_are_refused(plot) -> None:
    with pytest.raises(ValueError, match="list of results is empty"):
        plot([])
    with pytest.raises(ValueError, match="'L2P', the seed 0 .* different `method` names"):
        plot([run(), run()])


@pytest.mark.parametrize(
    ("plot", "content"),
    [
        (plot_accuracy_matrix, run("CODA-Prompt", tasks=3)),
        (plot_accuracy_matrix, run("A method whose name takes two lines", tasks=3, finished=2)),
        (plot_accuracy_matrix, run(tasks=4, task_names=["photo", "art_painting", "cartoon", "sketch"])),
        (plot_accuracy_matrix, run(tasks=20)),
        (plot_average_accuracy, [run(method, 10, seed) for method in ("L2P", "DualPrompt") for seed in range(2)]),
        (plot_average_accuracy, [run(finished=0)]),
        (plot_comparison, [run(f"Method {number}", tasks=10) for number in range(4)]),
        (plot_comparison, [run(tasks=1)]),
        (plot_curves, [run(f"A method with quite a long name {number}", tasks=10) for number in range(9)]),
        (plot_forgetting, [run(tasks=1)]),
        (plot_prompt_usage, np.eye(10, 100) + 0.1),
        (plot_prompt_usage, run("A method whose name takes two lines", prompt_usage=[[1, 2, 3]] * 3)),
        (plot_key_similarity, np.eye(10)),
        (plot_key_similarity, np.random.default_rng(0).normal(size=(7, 20, 8))),
    ],
)
def test_saved_picture_is_whole(plot, content, tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    assert isinstance(plot(content, path=path), Figure)
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 600
    assert len(np.unique(pixels[::5, ::5].reshape(-1, 3), axis=0)) > 20
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edges == 1).all()  # nothing is cut off


def test_no_global_state_of_pyplot_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would now fail
    assert len([axes for axes in plot_comparison([run("L2P"), run("DualPrompt")]).axes if axes.images]) == 2


@pytest.mark.parametrize("plot", [lambda: plot_accuracy_matrix([[0.5]]), lambda: plot_comparison([run()])])
def test_without_matplotlib_the_error_says_what_to_install(plot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install peft-cl\[plots\]"):
        plot()
