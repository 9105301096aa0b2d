"""Numbers that say which heatmaps to trust: metrics of faithfulness, robustness and localisation, beside baselines.

`evaluation` explains pictures by several methods, and by `baselines` that know nothing of the model; `metrics` is a
table of scores of one heatmap, each computed from a `case` that can run the model on changed images.

In: an `Explainer` and pictures. Out: an `Evaluation`. Imports `explaining`, `pictures` and the ground.
"""
