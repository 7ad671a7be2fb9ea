"""What is seen of a run: every step once, in metrics.jsonl, TensorBoard and W&B; the console's line; the GPUs' health."""

import contextlib
import io
import json
import re
import shutil
import socket
import struct
import sys
import time
import types
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from megatron_jobs.config import RunConfig
from megatron_jobs.monitoring.console import Console, Speed, Work, amount, duration, status
from megatron_jobs.planning import flops
from tests.conftest import MOE, tiny
from tests.megatron_jobs.test_train import train_here
from tests.ranks import run_ranks


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_run_and_its_restart_leave_every_step_once(prepared, tmp_path):
    """Two processes; stopped after step 4, of which the newest checkpoint knows three."""
    config = tiny(prepared, tmp_path, moe=MOE, train=dict(asynchronous_save=False))
    run_ranks(2, train_here, config, 4)
    shutil.rmtree(tmp_path / "checkpoints/step-00000004", ignore_errors=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run_ranks(2, train_here, config)

    records = lines(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["tokens"] for record in records][5:7] == [6 * 256, 7 * 256]
    last = records[-1]
    each = last["tokens_per_second_per_gpu"]
    assert each == pytest.approx(last["tokens_per_second"] / 2) == pytest.approx(256 / last["seconds"] / 2)
    assert last["tflops_per_gpu"] == pytest.approx(each * flops.per_token(config.model, config.moe, 64) / 1e12)
    assert records[0]["tflops_per_gpu"] == pytest.approx(
        records[0]["tokens_per_second_per_gpu"] * flops.per_token(config.model, config.moe, 32) / 1e12
    )
    assert last["mfu"] is None  # no GPU here
    assert (
        0 < last["data_seconds"] < last["seconds"] and last["memory_gib"] > 0.1 and "memory_reserved_gib" not in last and "gpu" not in last
    )
    assert [record["step"] for record in records if "checkpoint_seconds" in record] == [
        7,
        10,
    ]  # step 4 came again, without the save before it
    events = [(event["step"], event["what"]) for event in lines(tmp_path / "events.jsonl")]
    assert events == [(3, "checkpoint"), (3, "restart"), (6, "checkpoint"), (9, "checkpoint"), (10, "checkpoint")]
    for name, values in (("loss", records), ("loss_by_phase/chat", records[6:]), ("tflops_per_gpu", records)):
        key = name.split("/")[0].replace("_by_phase", "")
        assert dict(scalars(tmp_path, name)) == pytest.approx({record["step"]: record[key] for record in values})


def logged(config: RunConfig, act: Any, last_step: int = 0, passed_over: Any = ()) -> Any:
    """`act(log, step)` with a Log of step 0; `step` records a step with a given loss."""

    from megatron_jobs.engine import groups
    from megatron_jobs.monitoring.metrics import Log
    from megatron_jobs.monitoring.vitals import Watch

    watch = Watch()

    def step(log: Log, number: int, loss: float, **now_and_then: Any) -> None:
        told = {"phase": "web" if number <= 6 else "chat", "loss": loss, "loss_by_source": {"web": loss - 1, "code": loss + 1}}
        told |= {"tokens_by_source": {"web": 160, "code": 96}, "z_loss": 0.5, "lr": 1e-3, "grad_norm": 2.0, "seconds": 0.5}
        log.step(number, told | now_and_then, watch.vitals(0.125, 0.25))

    with groups.of_run(config.parallel, config.seed):
        return act(Log(config, last_step, "CPU", "local", passed_over), step)


def rewound(log: Any, step: Any) -> None:
    for number in range(1, 6):
        step(log, number, float(number))
    log.event(5, "rollback", reason="the loss is 5", to=3)
    log.rewind(3, 1)
    for number in range(4, 7):
        step(log, number, 10.0 + number, validation={"web": 7.0})
    log.close()


def test_a_rollback_leaves_every_step_once(prepared, tmp_path):
    run_ranks(1, logged, tiny(prepared, tmp_path), rewound)
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 14.0), (5, 15.0), (6, 16.0)]
    assert [(record["step"], record["loss"]) for record in lines(tmp_path / "metrics.jsonl")] == expected
    assert scalars(tmp_path, "loss") == expected
    assert scalars(tmp_path, "loss_by_source/code") == [(step, loss + 1) for step, loss in expected]
    assert scalars(tmp_path, "validation/web") == [(4, 7.0), (5, 7.0), (6, 7.0)]
    (event,) = lines(tmp_path / "events.jsonl")
    assert (event["step"], event["what"], event["to"]) == (5, "rollback", 3)


def test_lines_lost_from_the_middle_are_told(prepared, tmp_path):
    """What is no line of ours is no line; steps that were passed over never had one."""
    rows = [json.dumps({"step": step, "expert_load": None}) for step in (1, 2, 7, 9)]
    rows[2:2] = ['{"step": 4, "lo', "[3]", '{"step": "x"}', "null", "[" * 100_000]
    (tmp_path / "metrics.jsonl").write_text("".join(row + "\n" for row in rows))
    (told,) = run_ranks(1, reopened, tiny(prepared, tmp_path))
    assert f"{tmp_path}/metrics.jsonl: the lines of steps 3 to 4, 8 are lost: curves and reports lack them" in told
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [1, 2, 7, 9]


def reopened(config: RunConfig) -> str:
    from megatron_jobs.engine import groups
    from megatron_jobs.monitoring.metrics import Log

    with groups.of_run(config.parallel, config.seed), contextlib.redirect_stdout(io.StringIO()) as said:
        Log(config, 9, "CPU", "local", passed_over=[(5, 6)])
    return said.getvalue()


@pytest.fixture
def work(prepared, tmp_path) -> Work:
    return Work(tiny(prepared, tmp_path))


def record(step: int, phase: str, tokens: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "phase": phase, "tokens": tokens, "loss": 2.5, "lr": 3e-4, "grad_norm": 0.25} | more


def test_the_line_says_how_far_how_fast_and_until_when(prepared, tmp_path, work):
    """The time left counts the longer sequences of the second phase."""
    speed = Speed(work, 0.0)
    for step, now in ((1, 100.0), (2, 102.0), (3, 104.0)):  # the first step is slow, and does not count
        speed.add(step, now)
    assert speed.tokens_per_second == 128
    config = tiny(prepared, tmp_path)
    ratio = flops.per_token(config.model, None, 64) / flops.per_token(config.model, None, 32)
    assert ratio > 1.05
    assert speed.seconds_left(3) == pytest.approx(3 * 2 + 4 * 2 * ratio)
    line = status(record(3, "web", 768, mfu=0.4125), work, speed, 2.75, datetime(2026, 11, 30, 23, 59, 50))
    assert line == (
        "step 3/10  0:15 left, done Dec 01 00:00  loss 2.5000 (mean 2.7500)  web 768/1.54k tokens, run 768/2.56k  128 tokens/s"
        "  MFU 41.2%  lr 3.00e-04  norm 0.250"
    )
    last = status(record(10, "chat", 2560), work, speed, 2.5, datetime(2026, 12, 1))
    assert last.startswith("step 10/10  done  loss") and "chat 1.02k/1.02k tokens, run 2.56k/2.56k" in last and "MFU" not in last


def test_a_step_that_comes_again_after_a_rollback_counts_as_work(work):
    speed = Speed(work, 0.0)
    for now, step in enumerate((1, 2, 3, 2, 3), start=1):
        speed.add(step, now)
    assert speed.tokens_per_second == 256


def test_amounts_and_durations():
    assert [amount(value) for value in (7, 999, 999.7, 12_345, 1e6, 99_960_000, 4.1e9, 2e12)] == (
        ["7", "999", "1.00k", "12.3k", "1.00M", "100M", "4.10B", "2.00T"]
    )
    assert [duration(value) for value in (5, 65, 3661, 47 * 3600, 50 * 3600)] == ["0:05", "1:05", "1:01:01", "47:00:00", "2 d 2 h"]


def shown(work: Work, stream: io.StringIO, monkeypatch) -> str:
    """Ten steps of four seconds each, with an event after the third."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stdout", stream)
    console = Console(work)
    for step in range(1, 11):
        now[0] += 4
        console.step(record(step, "web" if step <= 6 else "chat", 256 * step))
        if step == 3:
            console.say("step 3: spike")
    return stream.getvalue()


def test_in_a_file_a_line_every_ten_seconds_and_when_something_happens(work, monkeypatch):
    written = shown(work, io.StringIO(), monkeypatch)
    assert "\r" not in written
    assert [re.match(r"step \d+", line)[0] for line in written.splitlines()] == [f"step {n}" for n in (1, 3, 4, 7, 10)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_is_rewritten_and_fits(work, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    written = shown(work, Terminal(), monkeypatch)
    screen = [line.split("\033[K")[-1] for line in written.split("\n")]  # what is left standing of each line
    assert [re.match(r"step \d+|$", line)[0] for line in screen] == ["step 3", "step 10", ""]
    assert written.count("\033[K") == 11 and "step 7/10" in written
    assert max(len(line) for line in re.split(r"\r\033\[K|\n", written)) == 59


def nvml(temperature: float, clock: float, reasons: int, errors: int | None) -> types.SimpleNamespace:
    """Stands for the module pynvml. `errors` None: the GPU does not tell."""

    class NVMLError(Exception):
        pass

    def ecc(gpu: str, kind: str, counter: str) -> int:
        assert (kind, counter) == ("uncorrected", "volatile")
        if errors is None:
            raise NVMLError
        return errors

    return types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        NVML_CLOCK_SM="sm",
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED="uncorrected",
        NVML_VOLATILE_ECC="volatile",
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-1": "handle"}[uuid],
        nvmlDeviceGetTemperature=lambda gpu, sensor: temperature,
        nvmlDeviceGetPowerUsage=lambda gpu: 512_000,
        nvmlDeviceGetClockInfo=lambda gpu, which: {"sm": clock}[which],
        nvmlDeviceGetCurrentClocksEventReasons=lambda gpu: reasons,
        nvmlDeviceGetTotalEccErrors=ecc,
    )


def watched() -> list[Any]:
    """What rank 0 sees of two GPUs at five looks, the last of them too early."""
    from megatron_jobs import ranks
    from megatron_jobs.config import ParallelConfig
    from megatron_jobs.engine import groups
    from megatron_jobs.monitoring import vitals

    rank = ranks.rank()
    looks = [(60, 1980, 0x01, 0), (61, 1975, 0x04, 0), (88, 1200, 0x44, 2), (89, 1100, 0x40, 2), (60, 1980, 0x00, 3)]
    with groups.of_run(ParallelConfig(), 1):
        mine = vitals.Watch(None, "GPU-1")
        seen = []
        for number, look in enumerate(looks):
            mine._nvml = nvml(*(look if rank else (70, 1500, 0x00, None)))
            mine._asked -= 0 if number == 4 else vitals.INTERVAL
            found = mine.vitals(0.25 * rank, 0.25)
            seen.append((found.fields, found.warnings))
    return seen


def test_the_worst_gpu_is_told_and_what_is_new_is_a_warning():
    seen, _ = run_ranks(2, watched)
    assert [fields["data_seconds"] for fields, _ in seen] == [0.25] * 5
    assert seen[0][0]["gpu"] == dict(
        hottest_c=70, hottest_rank=0, power_w=512, power_rank=1, slowest_mhz=1500, slowest_rank=0, ecc_errors=0
    )
    assert seen[1][0]["gpu"]["slowed"] == {"1": ["power cap"]}
    hot = seen[2][0]["gpu"]
    assert (hot["hottest_c"], hot["hottest_rank"], hot["slowest_mhz"], hot["slowest_rank"], hot["ecc_errors"]) == (88, 1, 1200, 1, 2)
    assert hot["slowed"] == {"1": ["power cap", "thermal slowdown (hardware)"]}
    assert "gpu" not in seen[4][0]  # ten seconds have not passed
    assert [warnings for _, warnings in seen] == [
        [],
        [],
        [
            ("gpu", "the GPU of rank 1 is slowed down: thermal slowdown (hardware) (1200 MHz, 88 °C, 512 W)"),
            ("gpu", "the GPU of rank 1 has 2 uncorrectable ECC errors: drain its node and reset the GPU"),
        ],
        [],
        [],
    ]


def test_a_slow_rank_is_named_once(prepared, tmp_path):
    """The others' wait for it is not theirs."""
    run_ranks(4, train_with_slow_rank, tiny(prepared, tmp_path, train=dict(micro_batch_size=1)), 3)
    told = [event for event in lines(tmp_path / "events.jsonl") if event["what"] == "straggler"]
    assert [event["reason"].split(" is slow: ")[0] for event in told] == [f"rank 3 on {socket.gethostname()}"]


def train_with_slow_rank(config: RunConfig, slow: int) -> None:
    from megatron_jobs import ranks, train
    from megatron_jobs.engine import groups, passes
    from megatron_jobs.monitoring import vitals

    vitals.STRAGGLER_STEPS = 5
    forward = passes.forward

    def slowed(*args: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return forward(*args, **options)

    if ranks.rank() == slow:
        passes.forward = slowed
    with groups.of_run(config.parallel, config.seed):
        train.train(config)


def sent(log: Any, step: Any) -> str:
    for number in range(1, 4):
        step(log, number, float(number))
    log.close()
    return (log.config.run / "wandb_id").read_text()


def with_wandb(prepared: Path, run: Path) -> RunConfig:
    return tiny(prepared, run, wandb={"project": "mujina", "name": "small"})


def test_wandb_offline_keeps_the_records_under_one_id(prepared, tmp_path):
    """The real package, writing its files; a restart goes on in the same W&B run."""
    config = with_wandb(prepared, tmp_path)
    (first,) = {run_ranks(1, offline, config)[0] for _ in range(2)}
    folders = sorted((tmp_path / "wandb").glob(f"offline-run-*-{first}"))
    assert len(folders) == 2
    for folder in folders:
        rows = wandb_rows(next(folder.glob("*.wandb")))
        assert [(row["step"], row["loss"], row["loss_by_source/code"]) for row in rows] == [(n, n, n + 1) for n in (1, 2, 3)]


def test_wandb_has_every_step_once_after_a_rollback(prepared, tmp_path):
    """In another W&B run, for nothing is taken back there; a restart goes on in it, and one after a kill before it began makes it."""
    config = with_wandb(prepared, tmp_path)
    assert run_ranks(1, offline, config, rewound) == [None]
    base = next((tmp_path / "wandb").glob("offline-run-*-*[0-9a-f]")).name.split("-")[3]
    assert (tmp_path / "wandb_id").read_text() == f"{base}-rollback1"
    for name, steps in (
        (base, [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]),
        (f"{base}-rollback1", [(1, 1), (2, 2), (3, 3), (4, 14), (5, 15), (6, 16)]),
    ):
        (file,) = (tmp_path / "wandb").glob(f"offline-run-*-{name}/*.wandb")
        assert [(row["step"], row["loss"]) for row in wandb_rows(file)] == steps
        assert (b"rolled back" in file.read_bytes()) == (name == base)
    (tmp_path / "wandb_id").write_text(base)
    run_ranks(1, offline, config, nothing, 6, [(4, 5)])
    *_, file = sorted((tmp_path / "wandb").glob(f"offline-run-*-{base}-rollback1/*.wandb"))
    assert [row["step"] for row in wandb_rows(file)] == [1, 2, 3, 4, 5, 6]


def nothing(log: Any, step: Any) -> None:
    log.close()


def offline(config: RunConfig, act: Any = None, last_step: int = 0, passed_over: Any = ()) -> Any:
    import os

    os.environ["WANDB_MODE"] = "offline"  # the fork server was started without it
    return logged(config, act or sent, last_step, passed_over)


def wandb_rows(path: Path) -> list[dict[str, Any]]:
    """The history in a W&B file, which is a LevelDB log: blocks of 32 KiB, of records behind headers of 7 bytes (CRC, length, type)."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            message = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if message.HasField("history"):
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in message.history.item})
    return rows


def test_wandb_is_not_there(prepared, tmp_path):
    with pytest.raises(AssertionError, match=r"UserError: wandb: the package is not installed here: pip install"):
        run_ranks(1, without_package, with_wandb(prepared, tmp_path))


def without_package(config: RunConfig) -> None:
    sys.modules["wandb"] = None  # what Python takes for a module that cannot be imported
    logged(config, sent)


def test_wandb_without_a_login_says_what_to_do(prepared, tmp_path):
    with pytest.raises(AssertionError, match=r"UserError: wandb: .*: log in \(wandb login, or WANDB_API_KEY\), set WANDB_MODE=offline"):
        run_ranks(1, without_login, with_wandb(prepared, tmp_path))


def without_login(config: RunConfig) -> None:
    import os

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        os.environ.pop(name, None)
    os.environ |= {"HOME": str(config.run), "NETRC": str(config.run / "none"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    logged(config, sent)


def test_a_wandb_that_fails_does_not_stop_the_run(prepared, tmp_path):
    """No server answers at the start, and then every call fails."""
    (said,) = run_ranks(1, broken, with_wandb(prepared, tmp_path))
    assert len(lines(tmp_path / "metrics.jsonl")) == 3
    assert said.count("W&B cannot be reached (no answer)") == 1 and said.count("W&B fails (gone): training goes on without it") == 1


class BrokenRun:
    def define_metric(self, *arguments: Any, **options: Any) -> None:
        pass

    def log(self, values: dict[str, float]) -> None:
        raise ConnectionError("gone")

    def finish(self) -> None:
        raise ConnectionError("gone")


def broken(config: RunConfig) -> str:
    def init(mode: str | None = None, **options: Any) -> BrokenRun:
        if mode != "offline":
            raise TimeoutError("no answer\nand more")
        return BrokenRun()

    errors = types.SimpleNamespace(AuthenticationError=PermissionError, UsageError=NameError)
    sys.modules["wandb"] = types.SimpleNamespace(errors=errors, Settings=dict, init=init)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        logged(config, sent)
    return said.getvalue()
