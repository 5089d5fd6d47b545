"""Experiments on real and drawn images that decide the defaults: ``python -m experiments.run --help``."""
