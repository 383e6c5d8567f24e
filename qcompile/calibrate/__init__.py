"""Calibration: quantizing with a look at a model's activations, one decoder block at a time."""
