"""Documents in, indexed token binaries out. May import tokenization."""
