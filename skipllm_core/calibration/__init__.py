"""Measures beforehand what skipping costs a model: similarity curve, regions, thresholds."""
