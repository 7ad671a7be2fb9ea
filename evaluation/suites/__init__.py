"""Suites, a file each: what is asked, and how the answers are scored.

A suite is a module with `evaluate(answerer, model, prompts, limit) -> Result`; what `mujina evaluate` prints and `mujina report` draws
follows from the Result.
"""
