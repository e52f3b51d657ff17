"""Parameter trees: masks, paths, averages, norm-ball perturbations. Small pure functions."""

from jrobust.weights._masks import indices, layer_ratios, random_by_layer, top_k
from jrobust.weights._points import (
    average,
    bezier,
    linear,
    project_to_layers,
    sample_sphere,
    scale_to_layers,
)

__all__ = [
    "average",
    "bezier",
    "indices",
    "layer_ratios",
    "linear",
    "project_to_layers",
    "random_by_layer",
    "sample_sphere",
    "scale_to_layers",
    "top_k",
]
