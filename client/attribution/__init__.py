"""Which regions drive a slide's score, from forward passes alone.

The methods work on a `Scorer` (masks in, scores out) and know neither Triton nor slides:
`occlusion`, `keep_one`, `partition_shap` (the default), `shapley_regression`, `counterfactual`.
"""
