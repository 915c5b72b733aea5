"""How far an adapter's predictions can be relied on."""

from __future__ import annotations

from .abstaining import (
    COVERAGES,
    Kept,
    RiskCoverage,
    accuracy_at_coverage,
    kept_above,
    risk_coverage_curve,
    threshold_for_accuracy,
)
from .calibration import (
    Calibration,
    CalibrationMeasures,
    ReliabilityBins,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability_bins,
)
from .ensembles import AdapterEnsemble, ensemble_of_top_k
from .experts import expert_tasks
from .fitting import calibrate, fit_calibration
from .gaussians import ClassGaussians, GaussianPart, gaussians_of
from .scores import (
    SCORES,
    ImageScorer,
    auroc,
    energy,
    false_positive_rate_at,
    key_similarity,
    mahalanobis,
    max_probability,
    score_images,
    separation,
)


__all__ = [
    "COVERAGES",
    "SCORES",
    "AdapterEnsemble",
    "Calibration",
    "CalibrationMeasures",
    "ClassGaussians",
    "GaussianPart",
    "ImageScorer",
    "Kept",
    "ReliabilityBins",
    "RiskCoverage",
    "accuracy_at_coverage",
    "auroc",
    "calibrate",
    "energy",
    "ensemble_of_top_k",
    "expected_calibration_error",
    "expert_tasks",
    "false_positive_rate_at",
    "fit_calibration",
    "fit_temperature",
    "gaussians_of",
    "kept_above",
    "key_similarity",
    "mahalanobis",
    "max_probability",
    "negative_log_likelihood",
    "reliability_bins",
    "risk_coverage_curve",
    "score_images",
    "separation",
    "threshold_for_accuracy",
]
