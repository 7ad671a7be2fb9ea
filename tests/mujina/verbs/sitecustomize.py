"""Python imports this at its start where the folder is on PYTHONPATH: `mujina` then has two verbs more, for tests of chains."""

from mujina.cli import VERBS

VERBS["write"] = ("writes", "add a line to a file")
VERBS["linger"] = ("lingers", "wait to be told to stop")
