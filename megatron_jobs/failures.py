"""When a run fails: every rank's log, the error that came first, and a watchdog for runs that hang.

    RUN/logs/attempt-3/rank-1.log     all that rank 1 wrote; only rank 0 and the first error are on the console as well
    RUN/logs/attempt-3/first_error    which rank failed first, and its traceback: whoever fails later because of it names this file
    RUN/logs/attempt-3/alive-1        when rank 1 got on, by the clock of its node; written as long as it does
    RUN/logs/attempt-3/hung-1         where rank 1 stood when the run hung; the stacks of all its threads are in its log

Needs no torch.
"""

import contextlib
import errno
import faulthandler
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from mujina import disks
from mujina.exits import MISTAKE
from mujina.processes import bytes_moved
from mujina.user_input import explain

MOVED = 1 << 20  # bytes: more than a process reads and writes that waits and tells of it
GRACE = 10  # seconds that the other ranks get to say where they are, or to end, before the run is taken down
# What the system refuses once, and would refuse again on any node; all else may be a disk or a network that is not well.
_LASTING = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
}
# What gloo, NCCL and their sockets say when another rank is gone.
_PEER_IS_GONE = re.compile(r"Connection (reset|closed|refused)|Broken pipe|NCCL|gloo|Timed out waiting", re.IGNORECASE)


def attempts(run: Path) -> list[Path]:
    """The log folders of a run's starts, oldest first."""
    return sorted(filter(_number, (run / "logs").glob("attempt-*")), key=_number)


def _number(attempt: Path) -> int:
    """0 where the name is not that of an attempt."""
    number = attempt.name.removeprefix("attempt-")
    return int(number) if number.isdecimal() else 0


def new_attempt(run: Path) -> Path:
    number = max((_number(path) for path in attempts(run)), default=0)  # some may have been removed
    while True:
        number += 1
        folder = run / "logs" / f"attempt-{number}"
        with contextlib.suppress(FileExistsError):  # that of another node, which is not in the list yet
            folder.mkdir(parents=True)
            return folder


def claim(attempt: Path, who: str, text: str) -> bool:
    """Writes the first error down, unless there is one already: then returns False. A full disk may leave nothing of it."""
    try:
        with (attempt / "first_error").open("x") as file:
            file.write(f"{who} on {socket.gethostname()}, {time.strftime('%F %T')}\n{text.rstrip()}\n")
    except FileExistsError:
        return False
    except OSError as error:
        print(f"{attempt / 'first_error'}: could not be written ({error})", file=sys.stderr, flush=True)
    return True


def first_error(attempt: Path) -> str:
    """What the first rank to fail has written down; empty where there is nothing."""
    with contextlib.suppress(OSError):
        return (disks.read(attempt / "first_error") or b"").decode(errors="replace").strip()
    return ""


def first_rank(attempt: Path) -> int | None:
    """The rank whose error was the first, where one has written it down."""
    found = re.match(r"rank (\d+) on", first_error(attempt))
    return int(found[1]) if found else None


@contextlib.contextmanager
def supervised(attempt: Path, rank: int, world_size: int, hang_seconds: float) -> Iterator["Watchdog"]:
    """Sends this rank's output to its log, watches it, and ends the process at once when the block raises an error."""
    attempt.mkdir(parents=True, exist_ok=True)  # rank 0 has made it, and another node may not see it yet
    console = _redirect(attempt / f"rank-{rank}.log", rank)
    watchdog = Watchdog(attempt, rank, world_size, hang_seconds, console)
    try:
        yield watchdog
    except Exception as error:
        _report(error, attempt, rank, console)
        # Not by an exception: taking the process groups down can wait for ranks that are gone.
        _end(MISTAKE if _told(error) else 1)
    finally:
        watchdog.close()


@contextlib.contextmanager
def before_the_ranks_meet(attempt: Path | None) -> Iterator[None]:
    """Writes down why rank 0, which makes the meeting place, could not (a port that is taken); the others have no `attempt` yet."""
    try:
        yield
    except Exception:  # whatever it is: it goes on up, once it is written down
        if attempt:
            claim(attempt, "rank 0", traceback.format_exc())
        raise


def stop_on_signal() -> Callable[[], bool]:
    """From now on SIGTERM and SIGUSR1 (sbatch --signal) do not end the process; what is returned tells whether one came."""
    came = threading.Event()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: came.set())
    return came.is_set


class Watchdog:
    """Ends the run when no rank has got on for `hang_seconds`, and says where each one stands. Every rank has its own.

    What gets on is marked: a step, a batch of a validation. So does who moves bytes, for a checkpoint may take longer to be verified, read
    or written than a hang to be told; the others wait for that rank.
    """

    def __init__(self, attempt: Path, rank: int, world_size: int, hang_seconds: float, console: int) -> None:
        self.attempt, self.rank, self.world_size, self.hang_seconds, self.console = attempt, rank, world_size, hang_seconds, console
        self._log = (attempt / f"rank-{rank}.log").open("a")
        self._closed = threading.Event()
        self._alive, self._last_told = attempt / f"alive-{rank}", 0.0
        faulthandler.enable(self._log)  # a segmentation fault leaves its stack, too
        self.mark()
        threading.Thread(target=self._watch, daemon=True).start()

    def mark(self) -> None:
        """This rank has got on."""
        self._marked = time.monotonic()
        self._wait_from(self._marked)
        self._signs: dict[Path, str] | None = None  # of the others' life, when this rank stood still for half of `hang_seconds`

    def _wait_from(self, moment: float) -> None:
        self._last_life = moment
        # Where C code hangs and holds the interpreter, no Python thread runs any more; this one is not Python's.
        faulthandler.dump_traceback_later(self.hang_seconds + GRACE, file=self._log, exit=True)

    def close(self) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        self._moved = bytes_moved()
        while not self._closed.wait(1):
            with contextlib.suppress(OSError):  # a file system that is not well is no hang, and does not end the watch
                self._look()

    def _look(self) -> None:
        if (now := bytes_moved()) > self._moved + MOVED:
            self._moved = now
            self.mark()
        if self._marked > self._last_told + self.hang_seconds / 10:
            self._tell_of_life()
        idle = time.monotonic() - self._last_life
        if self._signs is None and idle > self.hang_seconds / 2:
            self._signs = self._signs_of_life()
        if (self.attempt / "first_error").exists():
            self._closed.wait(GRACE)  # this rank may be waiting for one that is gone, and never know
            if not self._closed.is_set():
                _say(f"rank {self.rank} ends: {_first_line(self.attempt)}", self.rank, self.console)
                _end(1)
        elif any(self.attempt.glob("hung-*")) or idle > self.hang_seconds and not self._others_live():
            self._hung()

    def _tell_of_life(self) -> None:
        self._last_told = self._marked
        self._alive.parent.mkdir(parents=True, exist_ok=True)
        self._alive.write_text(f"{time.time():.3f}\n")

    def _signs_of_life(self) -> dict[Path, str]:
        signs = {}
        for path in self.attempt.glob("alive-*"):
            with contextlib.suppress(OSError):
                signs[path] = path.read_text(errors="replace")
        return signs

    def _others_live(self) -> bool:
        """Whether a rank has got on in the second half of `hang_seconds`; this one then waits for it. It is seen by what its file holds:
        neither the clocks of the nodes need agree, nor need the file system keep times."""
        signs = self._signs_of_life()
        lives = signs != self._signs
        if lives:
            self._wait_from(time.monotonic() - self.hang_seconds / 2)
            self._signs = signs
        return lives

    def _hung(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(self._log, all_threads=True)
        with contextlib.suppress(OSError):
            (self.attempt / f"hung-{self.rank}").write_text(_place())
        if self.rank == 0:
            deadline = time.monotonic() + GRACE / 2
            while len(list(self.attempt.glob("hung-*"))) < self.world_size and time.monotonic() < deadline:
                time.sleep(0.1)
            text = f"hung: nothing got on for {self.hang_seconds / 60:.3g} minutes (train.hang_minutes): {self._places()}"
            claim(self.attempt, "rank 0", text)
            _say(f"{text}; the stacks are in {self.attempt}", self.rank, self.console)
            if "without an answer" in text:
                time.sleep(GRACE)  # until faulthandler has written the stacks of those
        else:
            time.sleep(2 * GRACE)  # rank 0 speaks, and ends the run
        _end(1)

    def _places(self) -> str:
        """Which ranks are where, the fewest first."""
        ranks = defaultdict(list)
        for rank in range(self.world_size):
            path = self.attempt / f"hung-{rank}"
            ranks[f"in {path.read_text()}" if path.exists() else "without an answer"].append(rank)
        return "; ".join(
            f"rank{'s' * (len(there) > 1)} {', '.join(map(str, there))} {place}"
            for place, there in sorted(ranks.items(), key=lambda item: len(item[1]))
        )


def _place() -> str:
    """Where the main thread is: its innermost frame, and the innermost one of this package."""
    main = threading.main_thread().ident
    assert main is not None  # it has begun
    frame = sys._current_frames()[main]
    innermost = frame
    while frame.f_back and frame.f_globals.get("__package__") != __package__:
        frame = frame.f_back
    names = [f"{at.f_code.co_name} ({Path(at.f_code.co_filename).name}:{at.f_lineno})" for at in (innermost, frame)]
    return names[0] if innermost is frame else f"{names[0]}, called by {names[1]}"


def _redirect(log: Path, rank: int) -> int:
    """Sends all that this process writes, C libraries included, to `log`. Returns what was its standard error."""
    console = os.dup(2)
    sys.stdout.flush()
    sys.stderr.flush()
    if rank == 0:
        for number in (1, 2):
            tee = subprocess.Popen(
                ["tee", "-a", log], stdin=subprocess.PIPE, stdout=number, start_new_session=True, preexec_fn=_ignore_signals
            )
            assert tee.stdin is not None  # a pipe
            os.dup2(tee.stdin.fileno(), number)
            tee.stdin.close()
    else:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    return console


def _ignore_signals() -> None:
    """A signal to the run's processes, of which Slurm leaves out none, must not end what tells of it: that ends with them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _told(error: Exception) -> str | None:
    """What to tell of a mistake that would come again; None of anything else."""
    return None if isinstance(error, OSError) and error.errno not in _LASTING else explain(error)


def _report(error: Exception, attempt: Path, rank: int, console: int) -> None:
    told = _told(error)
    text = f"error: {told}" if told else traceback.format_exc()
    if told is None and _PEER_IS_GONE.search(str(error)):
        _wait_for_first_error(attempt)
    if claim(attempt, f"rank {rank}", text):
        _say(text if told else f"rank {rank} failed: {type(error).__name__}: {error} ({attempt / 'first_error'})", rank, console)
        if told is None:
            with contextlib.suppress(OSError), (attempt / f"rank-{rank}.log").open("a") as file:
                file.write(text)
    elif not told or told not in first_error(attempt):
        _say(f"rank {rank} ends: {_first_line(attempt)}", rank, console)


def _wait_for_first_error(attempt: Path) -> None:
    deadline = time.monotonic() + GRACE / 2
    while not (attempt / "first_error").exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def _first_line(attempt: Path) -> str:
    return f"the first error was of {first_error(attempt).partition(',')[0]}: see {attempt / 'first_error'}"


def _say(text: str, rank: int, console: int) -> None:
    print(text, file=sys.stderr, flush=True)
    if rank != 0:  # whose output goes to its log only
        os.write(console, f"{text}\n".encode())


def _end(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
