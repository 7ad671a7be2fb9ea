"""`python -m mujina VERB …`, where the command `mujina` is not on the path."""

from mujina.cli import main

main()
