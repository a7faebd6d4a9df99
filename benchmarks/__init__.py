"""Benchmarks: ratios against baselines that run beside ours. ``python -m benchmarks`` runs them all."""
