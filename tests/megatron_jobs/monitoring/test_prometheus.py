"""The Prometheus endpoint of a run, read over HTTP while it trains, and the Grafana dashboard that shows it."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from megatron_jobs.config import RunConfig
from mujina.user_input import UserError
from tests.conftest import MOE, tiny
from tests.megatron_jobs.monitoring.test_metrics import lines, logged, nvml
from tests.megatron_jobs.test_stability import train_with_faults
from tests.ranks import run_ranks
from tests.test_layering import imported_by, modules

ROOT = Path(__file__).parents[3]
DASHBOARD = json.loads((ROOT / "slurm/grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
PATH = f"{ROOT}/.venv/prometheus/usr/bin:{os.environ['PATH']}"
Scrape = dict[str, dict[str, float]]  # metric → value of its own label ("" where it has none) → value


def scraped(config: RunConfig) -> str:
    """What the endpoint answers at the place where it says that it is."""
    (group,) = json.loads((config.prometheus.targets / "small.json").read_text())
    (target,) = group["targets"]
    assert target.startswith(socket.gethostname() + ":")
    with urlopen(f"http://127.0.0.1:{target.split(':')[1]}/metrics", timeout=10) as answer:
        return answer.read().decode()


def parsed(text: str, run: str) -> Scrape:
    values: Scrape = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("run"), labels.pop("slurm_job"), labels.pop("host")) == (run, "4711", socket.gethostname())
            assert len(labels) <= 1
            values.setdefault(sample.name.removeprefix("mujina_"), {})[next(iter(labels.values()), "")] = sample.value
    return values


def watched(config: RunConfig, stop_after: int | None = None, pause: float = 0.0, faults: dict[int, str] | None = None) -> list[str]:
    """Trains, and on rank 0 returns what was scraped before the first step, after each, and at last.

    With `pause`, the seconds that it stands still after each step, scraping is left to others.
    """
    from megatron_jobs import train
    from megatron_jobs.engine import groups
    from megatron_jobs.monitoring import metrics, vitals

    os.environ["SLURM_JOB_ID"] = "4711"
    vitals.INTERVAL = 0
    train.Watch.of_this_process = lambda num_stages: vitals.Watch(nvml(88, 1200, 0x44, 2), "GPU-1")
    texts, step, last_word = [], metrics.Log.step, metrics.Log.last_word

    def step_and_scrape(log: Any, number: int, *arguments: Any) -> None:
        if not (texts or pause):
            texts.append(scraped(config))
        log._peak = 1e9  # as of a GPU
        arguments[-1].fields["memory_reserved_gib"] = 1.5
        step(log, number, *arguments)
        time.sleep(pause)
        if not pause:
            texts.append(scraped(config))

    def scrape_the_last_word(log: Any, state: str) -> None:
        def scrape() -> None:
            with contextlib.suppress(OSError):  # the endpoint, or its file, is gone
                while True:
                    texts.append(scraped(config))
                    time.sleep(0.05)

        thread = threading.Thread(target=scrape)
        thread.start()
        last_word(log, state)
        thread.join()

    metrics.Log.step = step_and_scrape
    if not pause:
        metrics.Log.last_word = scrape_the_last_word
    steps = iter(range(1, 100))
    with contextlib.suppress(SystemExit, UserError):
        if faults:
            train_with_faults(config, faults)
        else:
            with groups.of_run(config.parallel, config.seed):
                train.train(config, stop_requested=lambda: next(steps) == stop_after)
    return texts


def free_port() -> int:
    """The first of 17 free ports, below those that the system gives to whoever asks for any, and above those of slurm/supervisor.py."""
    for port in range(30000 + os.getpid() % 90 * 20, 32000, 20):
        with contextlib.suppress(OSError), contextlib.ExitStack() as taken:
            for number in range(port, port + 17):
                taken.enter_context(socket.create_server(("", number)))
            return port
    raise AssertionError("no free ports")


def full(prepared: Path, folder: Path, checkpoint_interval: int = 3, **sections: Any) -> RunConfig:
    """A run that has every metric."""
    return tiny(
        prepared,
        folder / "small",
        moe=MOE | {"capacity_factor": 1.0},
        data=dict(validation_tokens=64),
        train=dict(validation_interval=2, checkpoint_interval=checkpoint_interval),
        prometheus=dict(port=free_port(), targets=str(folder / "targets")),
        **sections,
    )


@pytest.fixture(scope="module")
def texts(prepared, tmp_path_factory) -> tuple[RunConfig, list[list[str]]]:
    """A run and what two attempts at it gave: the first is told to stop after step 4."""
    config = full(prepared, tmp_path_factory.mktemp("runs"))
    return config, [run_ranks(2, watched, config, stop_after)[0] for stop_after in (4, None)]


def test_what_is_scraped_is_what_metrics_jsonl_says(texts):
    config, attempts = texts
    records = {record["step"]: record for record in lines(config.run / "metrics.jsonl")}
    seen = []
    for attempt in attempts:
        for values in (parsed(text, "small") for text in attempt[1:]):
            record = records[values["step"][""]]
            seen.append(record["step"])
            expected = {
                "tokens": record["tokens"],
                "step_timestamp_seconds": record["time"],
                "step_seconds": record["seconds"],
                "data_wait_seconds": record["data_seconds"],
                "loss": record["loss"],
                "learning_rate": record["lr"],
                "gradient_norm": record["grad_norm"],
                "tokens_per_second": record["tokens_per_second"],
                "mfu_ratio": record["mfu"],
                "gpu_model_flops_per_second": record["tflops_per_gpu"] * 1e12,
                "memory_bytes": record["memory_gib"] * 2**30,
                "memory_reserved_bytes": 1.5 * 2**30,
                "gpu_temperature_celsius": 88,
                "gpu_power_watts": 512,
                "gpu_clock_hertz": 1.2e9,
                "gpu_ecc_errors": 4,  # two on each of two ranks
                "planned_steps": 10,
                "planned_tokens": 2560,
            }
            assert {name: values[name][""] for name in expected} == pytest.approx(expected)
            assert values["source_loss"] == record["loss_by_source"]
            assert values["phase"] == {"web": record["phase"] == "web", "chat": record["phase"] == "chat"}
            slowed = {reason: count for reason, count in values["gpus_slowed"].items() if count}
            assert slowed == {"power cap": 2, "thermal slowdown (hardware)": 2}
            for name, field in (
                ("expert_load_entropy", "load_entropy"),
                ("router_entropy", "router_entropy"),
                ("dropped_ratio", "dropped"),
            ):
                assert values[name] == dict(zip("0123", record[field], strict=True))
            validations = [step for step in records if step <= record["step"] and "validation" in records[step]]
            if validations and attempts.index(attempt) == 0:
                assert values["validation_loss"] == records[validations[-1]]["validation"]
    assert sorted(set(seen)) == list(range(1, 11))


def test_a_restart_goes_on_where_the_run_stands(texts):
    config, (first, second) = texts
    before, after = parsed(first[-1], "small"), parsed(second[0], "small")
    assert after["step"] == before["step"] == {"": 4} and after["tokens"] == before["tokens"] == {"": 1024}
    assert "loss" not in after
    counts = [parsed(text, "small")["events_total"] for text in (first[0], first[-1], second[0], second[-1])]
    assert [count["restart"] for count in counts] == [0, 0, 1, 1]
    events = lines(config.run / "events.jsonl")
    assert counts[-1]["checkpoint"] == [event["what"] for event in events].count("checkpoint") == 5
    assert [at["checkpoint_timestamp_seconds"][""] for at in (before, after)] == pytest.approx([events[1]["time"]] * 2)
    # counters of this process, from which Prometheus makes a speed
    assert after["trained_steps_total"] == {"": 0} and parsed(second[-1], "small")["trained_tokens_total"] == {"": 1536}


def test_the_last_word_is_seen_and_the_target_is_gone(texts):
    config, attempts = texts
    assert [parsed(attempt[-1], "small")["state"] for attempt in attempts] == [
        dict(running=0, done=0, stopped=1, failed=0),
        dict(running=0, done=1, stopped=0, failed=0),
    ]
    assert parsed(attempts[0][0], "small")["state"]["running"] == 1
    assert not list(config.prometheus.targets.iterdir())


def test_a_run_that_goes_back_and_then_gives_up(prepared, tmp_path):
    """Step 5 is not finite and is passed over with the one before it, from step 2 on; step 8 is not finite either."""
    config = full(prepared, tmp_path, checkpoint_interval=2, stability=dict(max_rollbacks=1, pass_over=2))
    (attempt,) = run_ranks(1, watched, config, None, 0.0, {5: "nan", 8: "nan"})
    seen = [parsed(text, "small") for text in attempt]
    assert [values["step"][""] for values in seen[:8]] == [0, 1, 2, 3, 4, 3, 6, 7]
    assert seen[5]["tokens"] == {"": 3 * 256} and seen[5]["trained_tokens_total"] == {"": 5 * 256}
    last = seen[-1]
    assert last["state"] == dict(running=0, done=0, stopped=0, failed=1)
    counts = {what: count for what, count in last["events_total"].items() if count}
    assert counts == Counter(event["what"] for event in lines(config.run / "events.jsonl"))
    assert (counts["rollback"], counts["stop"]) == (1, 1)


def quiet(config: RunConfig) -> None:
    """Three steps of a run that nobody scrapes: the end does not wait."""
    from megatron_jobs.monitoring import prometheus

    def no_sleep(seconds: float) -> None:
        raise AssertionError("nobody has scraped, and yet it waits")

    def act(log: Any, step: Any) -> None:
        for number in range(1, 4):
            step(log, number, float(number))
        log.last_word("done")
        log.close()

    prometheus.time = SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=no_sleep)
    logged(config, act)


@pytest.mark.parametrize("num_taken", [1, 16])
def test_a_port_that_is_taken_does_not_stop_the_run(prepared, tmp_path, num_taken):
    port = free_port()
    config = tiny(prepared, tmp_path, prometheus=dict(port=port))
    says = {1: f"port {port} is taken: the metrics are at port {port + 1}", 16: f"no port from {port} to {port + 15} can be had"}
    with contextlib.ExitStack() as taken:
        for number in range(port, port + num_taken):
            taken.enter_context(socket.create_server(("", number)))
        run_ranks(1, quiet, config)
    (event,) = lines(config.run / "events.jsonl")
    assert event["what"] == "prometheus" and event["reason"].startswith(says[num_taken])
    assert len(lines(config.run / "metrics.jsonl")) == 3


def imported(config: RunConfig) -> bool:
    logged(config, lambda log, step: step(log, 1, 1.0))
    return "megatron_jobs.monitoring.prometheus" in sys.modules


def test_without_the_section_nothing_is_imported(prepared, tmp_path):
    """And no other file imports the library."""
    assert run_ranks(1, imported, tiny(prepared, tmp_path)) == [False]
    importers = [module for module in modules() if any(name.startswith("prometheus_client") for name, _ in imported_by(module))]
    assert importers == ["megatron_jobs.monitoring.prometheus"]


def test_the_dashboard_shows_what_there_is(texts):
    """Every metric is in a panel, and no panel asks for another."""
    _, attempts = texts
    told = {family.name + ("_total" if family.type == "counter" else "") for family in text_string_to_metric_families(attempts[1][-2])}
    shown = {name for _, expression in expressions() for name in re.findall(r"mujina_\w+", expression)}
    assert shown == told


def expressions() -> list[tuple[dict[str, Any], str]]:
    return [(target, target["expr"]) for panel in PANELS for target in panel["targets"]]


def test_grafanas_own_models_hold_the_dashboard():
    """Into the types of Grafana's SDK and back: what they do not know, a misspelled key or option, would be lost on the way."""
    plugins.register_default_plugins()
    back = json.loads(JSONEncoder().encode(Dashboard.from_json(json.loads(json.dumps(DASHBOARD)))))
    assert holds(back, DASHBOARD)


def holds(more: Any, less: Any) -> bool:
    if isinstance(less, dict):
        return all(key in more and holds(more[key], value) for key, value in less.items())
    if isinstance(less, list):
        return len(more) == len(less) and all(map(holds, more, less))
    return more == less


def test_every_panel_has_data(prepared, tmp_path):
    """A real Prometheus finds two attempts of a run by itself, and answers what Grafana would ask; the last words, ten minutes later."""
    if shutil.which("prometheus", path=PATH) is None:
        give_up = pytest.fail if os.environ.get("MUJINA_NEEDS_PROMETHEUS") else pytest.skip
        give_up("no prometheus here: run_tests.sh unpacks Debian's package")
    config = full(prepared, tmp_path)
    port = config.prometheus.port + 16
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 500ms, scrape_timeout: 500ms}\n"
        "scrape_configs: [{job_name: mujina, file_sd_configs: [{files: [targets/*.json], refresh_interval: 500ms}]}]\n"
    )
    config.prometheus.targets.mkdir()
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}"]
    began, answers = time.time(), []
    with subprocess.Popen([shutil.which(command[0], path=PATH), *command[1:]], cwd=tmp_path, stderr=subprocess.DEVNULL) as server:
        try:
            for stop_after in (4, None):
                run_ranks(1, watched, config, stop_after, 2.0)  # Prometheus looks at what it has discovered every five seconds

            def ask(way: str, **question: Any) -> Any:
                with urlopen(f"http://127.0.0.1:{port}/api/v1/{way}?{urlencode(question)}") as answer:
                    return json.load(answer)["data"]

            assert ask("label/run/values") == ["small"]
            now = time.time()
            for target, expression in expressions():
                query = expression.replace("$__range", "1h").replace("$__rate_interval", "5m").replace("$run", "small|other")
                if target.get("instant"):
                    answers.append((query, ask("query", query=query, time=now + 600)["result"]))
                else:
                    answers.append((query, ask("query_range", query=query, start=began, end=now, step=0.5)["result"]))
        finally:
            server.terminate()
    assert not [query for query, found in answers if not found]
    (state,) = (found for query, found in answers if query.startswith("max by (run, slurm_job, host, state)"))
    assert [row["metric"]["state"] for row in state] == ["done"]
