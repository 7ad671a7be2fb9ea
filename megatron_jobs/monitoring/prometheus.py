"""The run at a Prometheus endpoint, when the configuration has a `prometheus` section: http://HOST:PORT/metrics on the node of rank 0.

With `prometheus.targets: FOLDER` the run writes FOLDER/RUN.json, and one Prometheus server finds all runs, wherever Slurm puts them:

    scrape_configs:
      - job_name: mujina
        file_sd_configs: [{files: [FOLDER/*.json], refresh_interval: 30s}]

The file goes when the run ends in good order; that of a run that was killed stays, and its target is down. slurm/grafana.json shows it all.

Every metric has the labels run (the name of its folder), slurm_job and host; `job` is a label of Prometheus's own. Where a run stands is a
gauge, for a rollback or a restart takes it back: in a counter Prometheus would take that for a new start from zero, and count all twice.
"""

import contextlib
import json
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from megatron_jobs.config import RunConfig
from megatron_jobs.monitoring.console import Work
from mujina.files import write_whole
from mujina.nvml import REASONS

NUM_PORTS = 16  # tried from `prometheus.port` on: so many runs can share a node, and a firewall need open no more
LONGEST_WAIT = 45.0  # seconds for the scrape of the last word; srun --wait=60 ends rank 0 when the others are gone for so long
State = Literal["running", "done", "stopped", "failed"]
EVENTS = ("checkpoint", "restart", "spike", "skip", "rollback", "stop")  # told from zero on, so that the first one is seen as an increase

# Metric: (field of the step's record or of its `gpu`, factor to Prometheus's base units, what it is). metrics.py says more.
GAUGES = {
    "step": ("step", 1, "Steps that are done"),
    "tokens": ("tokens", 1, "Tokens that are consumed"),
    "step_timestamp_seconds": ("time", 1, "When the last step was done"),
    "step_seconds": ("seconds", 1, "Duration of the last step"),
    "data_wait_seconds": ("data_seconds", 1, "Of the last step, the wait for data on the rank that waited longest"),
    "loss": ("loss", 1, "Mean cross-entropy, nats a token"),
    "learning_rate": ("lr", 1, "Learning rate of the last update"),
    "gradient_norm": ("grad_norm", 1, "Norm of the gradients before clipping"),
    "tokens_per_second": ("tokens_per_second", 1, "Tokens a second in the last step, all GPUs"),
    "mfu_ratio": ("mfu", 1, "Model FLOPs utilisation of the last step"),
    "gpu_model_flops_per_second": ("tflops_per_gpu", 1e12, "Model FLOPs a second and GPU in the last step"),
    "memory_bytes": ("memory_gib", 2**30, "Peak memory of the rank that has most"),
    "memory_reserved_bytes": ("memory_reserved_gib", 2**30, "GPU memory that PyTorch holds on the rank that has most"),
    "gpu_temperature_celsius": ("hottest_c", 1, "Of the hottest GPU"),
    "gpu_power_watts": ("power_w", 1, "Of the GPU that takes most"),
    "gpu_clock_hertz": ("slowest_mhz", 1e6, "SM clock of the slowest GPU"),
    "gpu_ecc_errors": ("ecc_errors", 1, "Uncorrectable memory errors since the last reboot, all GPUs"),
}


class Endpoint:
    """Rank 0 has one. What a scrape sees belongs to one and the same step."""

    def __init__(self, config: RunConfig, work: Work, step: int, tell: Callable[[str], None]) -> None:
        """`step`: the last one that is done. Without a free port `tell` is called with the reason, and nothing is served."""
        assert config.prometheus
        self._work, self._phases = work, [phase.name for phase in config.phases]
        self._layers = config.moe.layers(config.model) if config.moe else []
        name, host = config.run.resolve().name, socket.gethostname()
        self._labels = {"run": name, "slurm_job": os.environ.get("SLURM_JOB_ID", ""), "host": host}
        self._started, self._state, self._told = time.time(), "running", "running"
        self._scrapes: deque[float] = deque(maxlen=2)
        self._record: dict[str, Any] = {"step": step, "tokens": work.tokens(step)}
        self._trained = {"steps": 0, "tokens": 0}
        self._events: Counter[str] = Counter(dict.fromkeys(EVENTS, 0))
        self._checkpoint: float | None = None
        folder = config.prometheus.targets
        self._target = folder and folder / f"{name}.json"
        registry = CollectorRegistry()
        self._server = _serve(registry, config.prometheus.port, tell)
        if self._server is None:
            return
        if (config.run / "events.jsonl").exists():
            for line in (config.run / "events.jsonl").read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, LookupError):  # what is no line of ours does not count
                    event = json.loads(line)
                    self.event(str(event["what"]), float(event["time"]))
        registry.register(self)
        if self._target:
            try:
                write_whole(self._target, json.dumps([{"targets": [f"{host}:{self._server.server_port}"]}]).encode())
            except OSError as error:
                tell(f"prometheus.targets: {error}: the metrics are at port {self._server.server_port}, and no server is told")

    def step(self, record: dict[str, Any]) -> None:
        """`record` is a line of metrics.jsonl; what only some lines have, stays until it comes again."""
        tokens = record["tokens"] - self._work.tokens(record["step"] - 1)
        self._trained = {"steps": self._trained["steps"] + 1, "tokens": self._trained["tokens"] + tokens}
        self._record = {name: self._record[name] for name in ("gpu", "validation") if name in self._record} | record

    def event(self, what: str, when: float) -> None:
        """A line of events.jsonl."""
        self._events["spike" if what == "update" else what] += 1  # the verdict on a spike that is only logged
        if what == "checkpoint":
            self._checkpoint = when

    def close(self, state: State) -> None:
        """The run's last word. Where the endpoint has been scraped, it stays until that is seen, about as long as scrapes are apart."""
        if self._server is None:
            return
        self._state = state
        patience = min(1.5 * (self._scrapes[-1] - self._scrapes[0]) + 1, LONGEST_WAIT) if self._scrapes else 0
        end = time.monotonic() + patience
        while self._told != state and time.monotonic() < end:
            time.sleep(0.1)
        if self._told == state:
            time.sleep(0.5)  # the answer is still on its way
        if self._target:
            with contextlib.suppress(OSError):
                self._target.unlink()
        self._server.shutdown()
        self._server.server_close()

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """What prometheus_client asks for at each scrape, in a thread of its own."""
        self._scrapes.append(time.monotonic())
        state, record = self._state, self._record
        health = record.get("gpu", {})
        values = record | health
        for name, (field, factor, what) in GAUGES.items():
            if values.get(field) is not None:
                yield self._one(name, what, values[field] * factor)
        yield self._one("planned_steps", "Steps of all phases", self._work.num_steps)
        yield self._one("planned_tokens", "Tokens of all phases", self._work.num_tokens)
        yield self._one("start_timestamp_seconds", "When this process began to train", self._started)
        if self._checkpoint:
            yield self._one("checkpoint_timestamp_seconds", "When the newest checkpoint was whole", self._checkpoint)
        yield self._each("state", "1 at what the run is", "state", {name: name == state for name in get_args(State)})
        yield self._each("phase", "1 at the phase of the last step", "phase", {name: name == record.get("phase") for name in self._phases})
        yield self._each("source_loss", "Mean cross-entropy of a source's tokens, nats", "source", record.get("loss_by_source", {}))
        yield self._each("validation_loss", "The same over what is held out of training", "source", record.get("validation", {}))
        for name, field, what in (
            ("expert_load_entropy", "load_entropy", "Of the load of a layer's experts: 1 is even, 0 all in one"),
            ("router_entropy", "router_entropy", "The same of the router's mean scores"),
            ("dropped_ratio", "dropped", "Share of a layer's routed tokens that found no room"),
        ):
            if field in record:
                yield self._each(name, what, "layer", dict(zip(map(str, self._layers), record[field], strict=True)))
        if health:
            slowed = Counter(reason for reasons in health.get("slowed", {}).values() for reason in reasons)
            counts = {reason: slowed[reason] for reason in REASONS.values()}
            yield self._each("gpus_slowed", "GPUs whose clock is lowered", "reason", counts)
        for name, count in self._trained.items():
            what = f"{name.capitalize()} of this process since it began, those that came again included"
            yield self._each(f"trained_{name}", what, "", {"": count}, CounterMetricFamily)
        yield self._each("events", "Lines of the run's events.jsonl", "what", dict(self._events), CounterMetricFamily)
        self._told = state

    def _one(self, name: str, what: str, value: float) -> GaugeMetricFamily:
        return self._each(name, what, "", {"": value})

    def _each(self, name: str, what: str, label: str, values: Mapping[str, float], kind: Any = GaugeMetricFamily) -> Any:
        """A metric with a value for each value of `label`, or without that label where it is empty."""
        family = kind(f"mujina_{name}", what, labels=[*self._labels, *filter(None, [label])])
        for at, value in values.items():
            family.add_metric([*self._labels.values(), *filter(None, [at])], value)
        return family


def _serve(registry: CollectorRegistry, port: int, tell: Callable[[str], None]) -> Any:
    """The server, at the first free port; None where there is none."""
    for candidate in range(port, port + NUM_PORTS):
        try:
            server, _ = start_http_server(candidate, registry=registry)
        except OSError as error:
            problem = error
        else:
            if candidate != port:
                tell(f"port {port} is taken: the metrics are at port {candidate}")
            return server
    tell(
        f"no port from {port} to {candidate} can be had ({problem}): training goes on without the endpoint; choose another prometheus.port"
    )
    return None
