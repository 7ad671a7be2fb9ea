"""mujina linger FILE: says in the file that it has begun, and then which signals came, and ends with 143. A second call ends well."""

import signal
import sys
import time
from pathlib import Path

path = Path(sys.argv[1])
came: list[int] = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: came.append(number))
if path.exists():
    sys.exit(0)
path.write_text("began\n")
while not came:
    time.sleep(0.05)
time.sleep(0.5)  # for a second signal, if one is coming
path.write_text(f"saved after {' '.join(str(int(number)) for number in came)}\n")
sys.exit(143)
