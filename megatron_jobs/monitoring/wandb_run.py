"""The run at Weights & Biases, when the configuration has a `wandb` section.

The run's id stands in RUN/wandb_id, so that a restart goes on in the same W&B run. WANDB_MODE=offline keeps everything in RUN/wandb, from
where `wandb sync` sends it. Once training has begun, nothing that W&B does stops it.

W&B takes nothing back that was logged (its `rewind` needs a server that offers it, and a connection). So the steps that a rollback threw
away stay in the W&B run that they were logged to, which gets the tag "rolled back" and ends; another one of the same name, ID-rollback1, …,
is given the steps that still hold, from metrics.jsonl, and goes on. Steps that come again after a restart come with the same numbers.
"""

import importlib
import re
import secrets
from collections.abc import Callable, Iterable
from typing import Any

from megatron_jobs.config import RunConfig
from mujina.disks import read
from mujina.files import write_whole
from mujina.user_input import UserError

ID = re.compile(r"([\w-]+?)(-rollback\d+)?")  # in RUN/wandb_id
ROLLED_BACK = "rolled back"


def library() -> Any:
    """The package. Raises UserError when it is missing."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            "wandb: the package is not installed here: pip install -c constraints.txt -e '.[wandb]', or take the section out"
        ) from None


class WandbRun:
    """Rank 0 has one."""

    def __init__(
        self, config: RunConfig, num_rollbacks: int, rows: Callable[[], Iterable[dict[str, float]]], say: Callable[[str], None]
    ) -> None:
        """`num_rollbacks` of the run so far; `rows` gives what was logged of all steps that still hold.

        Raises UserError when the package is missing or nobody is logged in. Without a connection the run is kept on this machine.
        """
        assert config.wandb
        self._config, self._rows, self._say, self._is_silent = config, rows, say, False
        self._wandb = library()
        errors = self._wandb.errors
        try:
            self._begin(num_rollbacks)
        except (errors.AuthenticationError, errors.UsageError) as error:
            raise UserError(
                f"wandb: {error}: log in (wandb login, or WANDB_API_KEY), set WANDB_MODE=offline, or take the section out"
            ) from None

    def _begin(self, num_rollbacks: int) -> None:
        """Goes on in the run of so many rollbacks. One that is new is given the steps that still hold."""
        path = self._config.run / "wandb_id"
        known = (read(path) or b"").decode(errors="replace").strip()
        first = found[1] if (found := ID.fullmatch(known)) else secrets.token_hex(4)
        now = f"{first}-rollback{num_rollbacks}" if num_rollbacks else first
        assert self._config.wandb
        options: dict[str, Any] = dict(
            project=self._config.wandb.project,
            entity=self._config.wandb.entity,
            name=self._config.wandb.name or self._config.run.name,
            id=now,
            resume="allow",
            dir=str(self._config.run),
            config=self._config.model_dump(mode="json"),
        )
        # finish_timeout: at the end the rest is sent, but nobody waits long for a server that is down.
        settings = self._wandb.Settings(finish_timeout=60, init_timeout=60, console="off", silent=True)
        errors = self._wandb.errors
        try:
            self._run = self._wandb.init(settings=settings, **options)
        except (errors.AuthenticationError, errors.UsageError):
            raise
        except Exception as error:  # the server is down, or this node has no way out
            folder = self._config.run / "wandb"
            self._say(f"W&B cannot be reached ({_first_line(error)}): its records stay in {folder}; send them with `wandb sync`")
            self._run = self._wandb.init(settings=settings, mode="offline", **options)
        self._run.define_metric("*", step_metric="step")  # a restart makes steps come again, which W&B's own counter refuses
        if known != now:
            for row in self._rows() if num_rollbacks else ():
                self.log(row)
            write_whole(path, now.encode())

    def rewind(self, num_rollbacks: int) -> None:
        """A rollback has taken steps back: the run so far is marked and ended, and one begins that holds every step once."""

        def begin_anew() -> None:
            self._run.tags = (*(self._run.tags or ()), ROLLED_BACK)
            self._run.finish()
            self._begin(num_rollbacks)

        self._try(begin_anew)

    def log(self, values: dict[str, float]) -> None:
        self._try(lambda: self._run.log(values))

    def close(self) -> None:
        self._try(self._run.finish)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            if not self._is_silent:
                self._say(f"W&B fails ({_first_line(error)}): training goes on without it; metrics.jsonl has everything")
            self._is_silent = True


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
