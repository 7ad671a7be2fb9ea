"""Several processes that take turns, a step each: while one makes its step the others stand still, so that all see the same machine."""

import json
import resource
import subprocess
import sys
import time
from typing import Any


class Turns:
    """This process's share of the time: a step begins when the parent says so, and is told to it when it is done.

    seconds      of all steps so far
    peak_bytes   resident memory, at most, up to the end of the last step
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak_bytes = 0
        self._wait()

    def step_is_done(self, what: str = "step") -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps([what, self.seconds[-1]]), file=sys.__stdout__, flush=True)
        self._wait()

    def _wait(self) -> None:
        sys.stdin.readline()
        self._began = time.perf_counter()


def play(commands: dict[str, list[str]], **start: Any) -> tuple[dict[str, list[tuple[str, float]]], dict[str, dict[str, Any]]]:
    """Starts a process for each command (`start`: further arguments of Popen) and gives them turns until all have printed what they found,
    an object, in the place of a step. Returns the steps of each, (what, seconds), and these objects.
    """
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    sides = {name: subprocess.Popen(command, **pipes, **start) for name, command in commands.items()}
    steps: dict[str, list[tuple[str, float]]] = {name: [] for name in sides}
    found: dict[str, dict[str, Any]] = {}
    while len(found) < len(sides):
        for name, process in sides.items():
            if name in found:
                continue
            assert process.stdin and process.stdout
            process.stdin.write("go\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, f"{name} has ended with status {process.wait()}"
            told = json.loads(line)
            if isinstance(told, dict):
                found[name] = told
                process.wait()
            else:
                steps[name].append((told[0], told[1]))
                print(f"{name}: {told[0]} {len(steps[name])}, {told[1]:.2f} s", flush=True)
    return steps, found
