"""The exit statuses that mean something to whoever started the process; any other than 0 is a crash.

`mujina train` and `mujina chain` end with the status of the process that they started. slurm/supervisor.py does not requeue a job after
a MISTAKE, requeues it after STOPPED where Slurm is not at it already, and later and later after a crash.
"""

MISTAKE = 2  # an error that the user has to mend (UserError, NaN, a full disk): it would come again
STOPPED = 143  # told to stop (SIGTERM, Ctrl-C, a time limit near), and saved; as a shell says of what SIGTERM has ended: 128 + 15
