"""Pictures of a run: the accuracy matrix, curves, prompt usage, keys, calibration, and methods side by side.

matplotlib is an optional extra and is imported when a picture is drawn. Figures are built without pyplot: no global
state is touched, no display is needed, and nothing stays in memory once the figure is dropped.
"""

from __future__ import annotations

from .comparison import plot_comparison
from .curves import plot_average_accuracy, plot_curves, plot_forgetting
from .keys import plot_key_similarity
from .matrix import plot_accuracy_matrix
from .reliability import plot_reliability
from .usage import plot_prompt_usage


__all__ = [
    "plot_accuracy_matrix",
    "plot_average_accuracy",
    "plot_comparison",
    "plot_curves",
    "plot_forgetting",
    "plot_key_similarity",
    "plot_prompt_usage",
    "plot_reliability",
]
