"""Calibration: what schemes that look at activations need of data."""
