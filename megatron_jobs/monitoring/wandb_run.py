"""The run at Weights & Biases, when the configuration has a `wandb` section.

The run's id stands in RUN/wandb_id, so that a restart goes on in the same W&B run. WANDB_MODE=offline keeps everything in RUN/wandb, from
where `wandb sync` sends it. Once training has begun, nothing that W&B does stops it.
"""

import importlib
import secrets
from collections.abc import Callable
from typing import Any

from megatron_jobs.config import RunConfig
from mujina.files import write_whole
from mujina.user_input import UserError


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

    def __init__(self, config: RunConfig, say: Callable[[str], None]) -> None:
        """Raises UserError when the package is missing or nobody is logged in. Without a connection the run is kept on this machine."""
        assert config.wandb
        self._say, self._is_silent = say, False
        self._wandb = library()
        path = config.run / "wandb_id"
        if not path.exists():
            write_whole(path, secrets.token_hex(4).encode())
        options: dict[str, Any] = dict(
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=config.wandb.name or config.run.name,
            id=path.read_text(),
            resume="allow",
            dir=str(config.run),
            config=config.model_dump(mode="json"),
        )
        # finish_timeout: at the end the rest is sent, but nobody waits long for a server that is down.
        settings = self._wandb.Settings(finish_timeout=60, init_timeout=60, console="off", silent=True)
        errors = self._wandb.errors
        try:
            self._run = self._wandb.init(settings=settings, **options)
        except (errors.AuthenticationError, errors.UsageError) as error:
            raise UserError(
                f"wandb: {error}: log in (wandb login, or WANDB_API_KEY), set WANDB_MODE=offline, or take the section out"
            ) from None
        except Exception as error:  # the server is down, or this node has no way out
            say(f"W&B cannot be reached ({_first_line(error)}): its records stay in {config.run}/wandb; send them with `wandb sync`")
            self._run = self._wandb.init(settings=settings, mode="offline", **options)
        self._run.define_metric("*", step_metric="step")  # a rollback makes steps come again, which W&B's own counter refuses

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
