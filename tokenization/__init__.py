"""Tokenizers: training, loading, chat templates. Imports no sibling room."""
