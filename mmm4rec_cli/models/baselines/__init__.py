"""Baselines behind `--model`: one file a model, what they share beside them."""
