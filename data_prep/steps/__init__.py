"""Steps between raw text and documents worth training on: each module is a family, `step.py` says what a step is."""
