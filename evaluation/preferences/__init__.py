"""Pairs of a model's own answers, of which rules or a judge prefer one, for phases of `loss.kind: preference`."""
