"""Models in and out: Hugging Face folders, GGUF, upcycling, and the comparison of logits that each of them ends with."""
