"""Where a preparation runs: on this machine's cores, or through datatrove's executors on a Slurm or Ray cluster."""

import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data_prep import pipeline
from data_prep.config import PrepareConfig
from data_prep.indexed import Manifest
from data_prep.pipeline import Stage, Task
from data_prep.report import write_report
from data_prep.steps.read import find_inputs
from data_prep.tokenize import tokenize, use
from data_prep.workers import Workers, unexpected
from mujina.files import write_whole
from mujina.locks import hold
from mujina.user_input import UserError
from tokenization.load import load
from tokenization.tokenizer import Tokenizer

ERRORS = "errors.log"  # of the output: what Python says of errors that nobody expected


def prepare(config: PrepareConfig) -> list[Manifest]:
    """Prepares all sources on this machine; returns the manifests of the binaries, in order (none without a tokenizer).

    Raises UserError on unreadable files, sources without documents, a full disk, and sources that another process is at.
    """
    with _held(config):
        return _prepare(config, _check(config))


def _prepare(config: PrepareConfig, stages: dict[str, list[Stage]]) -> list[Manifest]:
    _use_tokenizer(config)
    logger.remove()  # datatrove tells its story in the log files of the stages
    columns = SpinnerColumn(finished_text="✓"), TextColumn("{task.description:20} {task.fields[state]}"), TimeElapsedColumn()
    manifests = []
    with Workers(config.processes, Path(config.output) / ERRORS) as workers, Progress(*columns, console=Console(stderr=True)) as progress:
        for name in config.sources:
            line = progress.add_task(name, total=None, state="")

            def say(state: str, line: Any = line) -> None:
                progress.update(line, state=state)

            for number, stage in enumerate(stages[name], start=1):
                executor = LocalPipelineExecutor(stage.pipeline, stage.tasks, logging_dir=_logs(config, name, stage.name))
                missing = executor.get_incomplete_ranks()
                before = f"stage {number} of {len(stages[name])}, {stage.name}: "
                ranks = ((executor, rank) for rank in missing)
                for ended, _ in enumerate(workers.map(_run_rank, ranks, ahead=stage.tasks), start=stage.tasks - len(missing) + 1):
                    say(f"{before}{ended:,} of {stage.tasks:,} tasks")
            manifest = _finish(config, name, workers, say)
            manifests += [] if manifest is None else [manifest]
            progress.update(line, total=1, completed=1)
    return manifests


def submit_to_slurm(config: PrepareConfig) -> None:
    """Submits what is missing of each source as a chain of array jobs, and returns.

    Raises UserError while another process, or jobs of an earlier call, are at one of them.
    """
    with _held(config):
        stages = _check(config)
    for name in config.sources:
        with _held(config.model_copy(update={"sources": {name: config.sources[name]}})):  # its last job will want to hold it soon
            _submit(config, name, stages[name])


def _submit(config: PrepareConfig, name: str, stages: list[Stage]) -> None:
    assert config.slurm is not None
    alone = config.model_copy(update={"processes": config.slurm.tokenizer_cpus})
    finish = Stage("finish", 1, [Task(partial(_finish_alone, alone, name))])
    executor: Any = None
    for stage in [*stages, finish]:
        executor = _slurm_executor(config, name, stage, executor)
    executor.skip_completed = False  # the last one looks for itself what is left to do
    executor.run()
    write_whole(_last_job(config, name), str(executor.job_id).encode())
    print(f"{name}: {len(stages) + 1} stages in the queue, the last is job {executor.job_id}")


def _slurm_executor(config: PrepareConfig, name: str, stage: Stage, before: SlurmPipelineExecutor | None) -> SlurmPipelineExecutor:
    assert config.slurm is not None
    site = config.slurm
    root = Path(__file__).parents[1]
    return SlurmPipelineExecutor(
        [*([After(_logs(config, name, before.job_name.removeprefix(f"{name}-")), before.tasks)] if before else []), *stage.pipeline],
        tasks=stage.tasks,
        # A stage is one array: of several, datatrove would let the next stage wait for the last one only.
        tasks_per_job=math.ceil(stage.tasks / site.max_array_size),
        max_array_size=site.max_array_size,
        job_name=f"{name}-{stage.name}",
        time=site.time,
        partition=site.partition,
        qos=site.qos,
        cpus_per_task=site.tokenizer_cpus if stage.name == "finish" else 1,
        mem_per_cpu_gb=site.memory_gb,
        env_command=f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={root}",
        # A stage that waits for one that failed would wait for ever.
        sbatch_args={"kill-on-invalid-dep": "yes", "open-mode": "append", **site.sbatch},
        logging_dir=_logs(config, name, stage.name),
        depends=before,
    )


class After(PipelineStep):
    """Refuses to start before all ranks of another stage have ended, whatever the scheduler believes."""

    type, name = "GUARD", "after"

    def __init__(self, logs: str, tasks: int) -> None:
        super().__init__()
        self.logs, self.tasks = Path(logs), tasks

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        ended = len(list((self.logs / "completions").glob("*")))
        if ended != self.tasks:
            raise UserError(f"{self.logs}: {ended} of {self.tasks} tasks have ended: see their logs, and start the preparation again")
        return data


@contextmanager
def _held(config: PrepareConfig) -> Iterator[None]:
    """Keeps all other preparations away from the sources: two writers would share files."""
    with ExitStack() as held:
        for name in config.sources:
            held.enter_context(_hold(config, name))
            _refuse_queued(name, _last_job(config, name))
        yield


def _hold(config: PrepareConfig, name: str) -> AbstractContextManager[None]:
    return hold(Path(config.output) / f".{name}.lock", f"source {name} of {config.output}")


def _last_job(config: PrepareConfig, name: str) -> Path:
    return Path(config.output) / name / "stages" / "last_slurm_job"


def _refuse_queued(name: str, last_job: Path) -> None:
    """A task of a job that waits or runs holds no lock."""
    job = last_job.read_text() if last_job.exists() else ""
    if not job or shutil.which("squeue") is None:  # the folder may have been copied from a cluster
        return
    if subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True).stdout.strip():
        raise UserError(f"source {name}: job {job} of an earlier call is still in the queue: wait for it, or scancel it first")


def run_on_ray(config: PrepareConfig) -> list[Manifest]:
    """Runs the steps on the Ray cluster that `ray.init` finds (RAY_ADDRESS; else this machine), then tokenizes here."""
    import ray

    root = str(Path(__file__).parents[1])
    with _held(config):
        stages = _check(config)
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": root}}, include_dashboard=False, log_to_driver=False)
        try:
            for name in config.sources:
                for stage in stages[name]:
                    executor = RayPipelineExecutor(stage.pipeline, tasks=stage.tasks, logging_dir=_logs(config, name, stage.name))
                    executor.run()
                    if missing := executor.get_incomplete_ranks():
                        raise UserError(
                            f"source {name}: {len(missing)} of {stage.tasks} tasks of stage {stage.name} failed: see "
                            f"{executor.logging_dir.path}/logs, and start again: what has ended stays"
                        )
        finally:
            ray.shutdown()
        return _prepare(config, stages)


def _check(config: PrepareConfig) -> dict[str, list[Stage]]:
    """The stages of each source. All names are resolved first, so that a misspelled path is not found out after hours."""
    stages = {name: _stages(config, name) for name in config.sources}
    for name in filter(stages.get, stages):
        for path in pipeline.take_back(stages[name], Path(config.output) / name):
            print(f"source {name}: {path} is gone, or is not what was written: its task runs again", file=sys.stderr)
    return stages


def _stages(config: PrepareConfig, name: str) -> list[Stage]:
    source = config.sources[name]
    if pipeline.is_needed(source):
        return pipeline.stages(name, source, Path(config.output) / name)
    find_inputs(source.documents)
    return []


def _logs(config: PrepareConfig, name: str, stage: str) -> str:
    return str(Path(config.output).absolute() / name / "stages" / stage)


def _run_rank(executor: LocalPipelineExecutor, rank: int) -> None:
    try:
        with open("/dev/null", "w") as nowhere, redirect_stderr(nowhere):  # its log file has the same
            executor._run_for_rank(rank, local_rank=1)
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        raise unexpected(error, f"task {rank}", Path(executor.logging_dir.path) / f"logs/task_{rank:05}.log") from None


def _use_tokenizer(config: PrepareConfig) -> None:
    if tokenizer := _tokenizer(config):
        if tokenizer.remark:
            print(tokenizer.remark, file=sys.stderr)
        use(tokenizer)


def _tokenizer(config: PrepareConfig) -> Tokenizer | None:
    return load(config.tokenizer, config.end_of_document, config.begin_documents) if config.tokenizer is not None else None


def _finish_alone(config: PrepareConfig, name: str, _: int) -> None:
    """`_finish` as a task of its own on a cluster, with a core for each of its processes."""
    _use_tokenizer(config)
    with Workers(config.processes, Path(config.output) / ERRORS) as workers, _hold(config, name):
        manifest = _finish(config, name, workers, print)
    for note in notes(config, [manifest] if manifest else []):
        print(note)


def notes(config: PrepareConfig, manifests: list[Manifest]) -> list[str]:
    """What is not in these binaries, or was not in their documents."""
    empty = [f"source {one.name}: {one.num_empty:,} documents of nothing were left out" for one in manifests if one.num_empty]
    damaged = [
        f"source {one.name}: {one.num_damaged:,} dialogues were passed over, such as {one.damaged[0]}"
        for one in manifests
        if one.num_damaged
    ]
    tokenizer = _tokenizer(config) if any(one.template_hash for one in manifests) else None
    return empty + damaged + [f"{config.tokenizer}: its chat template {note}" for note in (tokenizer.template_notes() if tokenizer else [])]


def _finish(config: PrepareConfig, name: str, workers: Workers, say: Callable[[str], None]) -> Manifest | None:
    """What is left when all stages of a source have ended: its documents' name, its report, its binary."""
    source, output = config.sources[name], Path(config.output)
    if pipeline.is_needed(source):
        folder = output / name
        files = pipeline.finish(folder)
        write_report([pipeline.report(name, source, folder)], folder / "report.html")
        say(f"documents in {folder / 'documents'}")
    else:
        files = find_inputs(source.documents)
    return tokenize(name, source, files, output, workers, say) if config.tokenizer else None
