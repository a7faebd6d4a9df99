"""Training datasets: splits, folds, report, manifest, saving, and getting them back."""
