"""What every room may use and what uses none of them: verbs, files, pages, configuration, errors, matrices, answers, chains of verbs."""
