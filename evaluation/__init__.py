"""Evaluation: what a trained Hugging Face folder answers, how often that is right, and one HTML report of the runs."""
