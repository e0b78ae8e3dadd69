"""The trainer: start it with `python -m train.main`."""
