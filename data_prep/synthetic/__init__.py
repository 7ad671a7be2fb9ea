"""Synthetic documents: rule-based dialogues."""
