"""Checkpoints looked into, averaged and written in other files; and how little memory it takes to write their weights."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_jobs.checkpoints import tools
from megatron_jobs.checkpoints.checkpoint import STATES, Checkpoint, Writer, box_key
from megatron_jobs.checkpoints.tools import average, inspect, reshape, rows
from megatron_jobs.checkpoints.weights import shapes
from megatron_jobs.conversion import convert
from megatron_jobs.data.ledger import Consumed, Ledger, Origin, PhaseRecord
from mujina.matrices import Box
from mujina.tensor_files import Planned, write_safetensors, write_shards
from mujina.user_input import UserError
from tests.conftest import MOE, tiny
from tests.megatron_jobs.checkpoints.test_checkpoint import kill_at_change
from tests.megatron_jobs.test_train import losses, train_here
from tests.ranks import run_ranks

SHAPES = {"embedding": (50, 8), "layers.0.down": (8, 24), "layers.1.down": (8, 24), "layers.1.up": (24, 8), "final_norm": (8, 1)}
WEB = Consumed(samples=1, tokens=7, first_block=0, num_blocks=1, checksum="x")
LEDGER = Ledger(tokens=7, block_length=8, phases=(PhaseRecord(name="a", steps=1, tokens=7, sources={"web": WEB}),))


def whole(shape: tuple[int, int]) -> Box:
    return Box(0, shape[0], 0, shape[1])


def values_of(found: Checkpoint) -> dict[str, torch.Tensor]:
    return {f"{state} {name}": found.read(name, whole(shape), state) for state in found.states for name, shape in found.shapes.items()}


def equal(one: Checkpoint, other: Checkpoint) -> bool:
    mine, its = values_of(one), values_of(other)
    return mine.keys() == its.keys() and all(mine[key].view(torch.int32).equal(its[key].view(torch.int32)) for key in mine)


def written(config, folder: Path, step: int, seed: int = 0, shapes=SHAPES, **changes: torch.Tensor) -> Checkpoint:
    """A checkpoint of random values; `changes` replace weights (`layers_1_down=…`)."""
    draw = torch.Generator().manual_seed(seed)
    pieces = {box_key(state, name, whole(shape)): torch.randn(shape, generator=draw) for state in STATES for name, shape in shapes.items()}
    for name, values in changes.items():
        name = name.replace("_", ".", 2)
        pieces[box_key("master", name, whole(shapes[name]))] = values
    writer = Writer(folder, step)
    writer.clear()
    writer.add_rank_file(0, pieces)
    return Checkpoint(writer.finish(config, step, shapes, LEDGER.model_copy(update={"tokens": 7 * step})))


@pytest.fixture(scope="module")
def mixture(prepared, tmp_path_factory) -> Path:
    """The folder of a run of two processes, with the checkpoints of steps 6, 9 and 10."""
    run = tmp_path_factory.mktemp("mixture")
    run_ranks(2, train_here, tiny(prepared, run, moe=MOE, parallel=dict(expert=2)))
    return run


# Files


@pytest.mark.parametrize("files", [1, 7])
def test_a_run_goes_on_from_other_files_bit_by_bit(prepared, mixture, tmp_path, files):
    reshape(mixture / "checkpoints/step-00000006", tmp_path / "checkpoints", files=files)
    before, after = Checkpoint(mixture / "checkpoints/step-00000006"), Checkpoint(tmp_path / "checkpoints/latest")
    assert len(after.files) == files + 1 and equal(before, after)
    assert (after.step, after.tokens, after.updates, after.config, after.ledger) == (
        before.step, before.tokens, before.updates, before.config, before.ledger,
    )  # fmt: skip
    sizes = [facts["bytes"] for name, facts in after.files.items() if name.endswith(".safetensors")]
    assert max(sizes) < 1.3 * min(sizes)
    run_ranks(2, train_here, tiny(prepared, tmp_path, moe=MOE, parallel=dict(expert=2)))
    assert losses(tmp_path) == losses(mixture)[6:]
    assert equal(Checkpoint(mixture / "checkpoints/latest"), Checkpoint(tmp_path / "checkpoints/latest"))


def test_files_of_a_size_and_without_the_moments(prepared, mixture, tmp_path):
    reshape(mixture / "checkpoints/latest", tmp_path / "start", file_bytes=100_000, weights_only=True)
    before, after = Checkpoint(mixture / "checkpoints/latest"), Checkpoint(tmp_path / "start/latest")
    weights = {key: values for key, values in values_of(before).items() if key.startswith("master ")}
    assert after.states == ["master"] and all(values.equal(weights[key]) for key, values in values_of(after).items())
    sizes = [facts["bytes"] for name, facts in after.files.items() if name.endswith(".safetensors")]
    assert len(sizes) == math.ceil(4 * sum(rows * columns for rows, columns in after.shapes.values()) / 100_000) and max(sizes) < 125_000
    # Its values start a run, as those of the whole one do; to go on from, it lacks the moments.
    for name, start in (("whole", mixture / "checkpoints/latest"), ("weights", tmp_path / "start/latest")):
        run_ranks(1, train_here, tiny(prepared, tmp_path / name, moe=MOE, train=dict(init_from=str(start))), 1)
    assert losses(tmp_path / "weights") == losses(tmp_path / "whole")
    with pytest.raises(AssertionError, match="holds 0 of the .* values of exp_avg"):
        (tmp_path / "run").mkdir()
        (tmp_path / "start").rename(tmp_path / "run/checkpoints")
        run_ranks(1, train_here, tiny(prepared, tmp_path / "run", moe=MOE), 11)


def test_what_reshape_refuses(prepared, tmp_path):
    source = written(tiny(prepared, tmp_path), tmp_path / "run/checkpoints", 3)
    with pytest.raises(UserError, match=r"run/checkpoints: exists and is not empty"):
        reshape(source.folder, source.folder.parent)
    with pytest.raises(UserError, match="10000 files are too many"):
        reshape(source.folder, tmp_path / "out", files=10_000)
    file = source.folder / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="its checksum is not that of the save"):
        reshape(source.folder, tmp_path / "out", files=2)
    assert not (tmp_path / "out").exists()


def test_killed_at_every_change_of_the_disk(prepared, tmp_path):
    """Under the name of the output is nothing, or all of it; and the command can be given again."""
    config = tiny(prepared, tmp_path)
    sources = [written(config, tmp_path / str(step), step, seed=step) for step in (1, 2)]
    for number in itertools.count(1):
        output = tmp_path / "out" / str(number)
        child = os.fork()
        if child == 0:
            kill_at_change(number)
            average([*(source.folder for source in sources), output])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not output.exists():
            average([*(source.folder for source in sources), output])
        Checkpoint(output / "latest").verify()
        assert [path.name for path in output.parent.glob(f".{number}.*")] == []
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert number > 10


# Averages


def test_the_mean_of_the_newest_is_a_model_to_start_from_and_to_convert(prepared, mixture, tmp_path):
    average([mixture, tmp_path / "mean"], last=2)
    steps = [Checkpoint(mixture / f"checkpoints/step-{step:08d}") for step in (9, 10)]
    found = Checkpoint(tmp_path / "mean/latest")
    for name, shape in found.shapes.items():
        one, other = (source.read(name, whole(shape)).double() for source in steps)
        assert found.read(name, whole(shape)).equal(((one + other) / 2).float()) and not one.equal(other)
    assert (found.step, found.tokens, found.states) == (10, steps[1].tokens, ["master"])
    origin = Origin(kind="averaged", of=tuple(source.identity for source in steps), ledger=steps[1].ledger)
    assert found.ledger == steps[1].ledger.model_copy(update={"origin": origin})
    run_ranks(1, train_here, tiny(prepared, tmp_path / "run", moe=MOE, train=dict(init_from=str(tmp_path / "mean/latest"))), 1)
    first = losses(tmp_path / "run")[0]
    assert first < losses(mixture)[0] - 0.5
    run_ranks(1, convert.main, tmp_path / "mean/latest", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/conversion.json").read_text())["agreement"]["max_relative_error"] <= 1e-4


def test_only_checkpoints_of_one_model_are_averaged(prepared, tmp_path):
    here = written(tiny(prepared, tmp_path), tmp_path / "a", 1).folder
    other = written(tiny(prepared, tmp_path, model=dict(rope_theta=500_000), moe=MOE), tmp_path / "b", 2).folder
    with pytest.raises(UserError, match=r"not of one model: model.rope_theta is 10000.0 and 500000.0; moe.num_experts is None and 4"):
        average([here, other, tmp_path / "out"])
    with pytest.raises(UserError, match="each one once"):
        average([here, here.parent / "latest", tmp_path / "out"])
    with pytest.raises(UserError, match="has 0 checkpoints and not 3: raise train.keep_checkpoints"):
        average([tmp_path, tmp_path / "out"], last=3)


# Looking


def test_norms_ranges_and_what_is_not_finite(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "BOX_BYTES", 200)  # many boxes to a matrix
    broken = torch.arange(-96.0, 96.0).view(8, 24)
    broken[2, 3], broken[7, 0], broken[0, 0] = math.nan, math.inf, -math.inf
    source = written(tiny(prepared, tmp_path), tmp_path / "a", 1, layers_1_down=broken)
    table = {name: (shape, found) for name, shape, found in rows(source, None, by="matrix")}
    assert list(table) == list(SHAPES)
    shape, found = table["layers.1.down"]
    finite = broken[broken.isfinite()]
    assert (shape, found.num_values, found.num_nan, found.num_inf) == ("8 × 24", 192, 1, 2)
    assert (found.low, found.high) == (-95, 95) and found.norm == pytest.approx(float(finite.norm()), rel=1e-6)
    up = source.read("layers.1.up", whole((24, 8)))
    assert table["layers.1.up"][1].norm == pytest.approx(float(up.norm()), rel=1e-6)
    layers = {name: (shape, found) for name, shape, found in rows(source, None)}
    assert list(layers) == ["embedding", "layers.0", "layers.1", "final_norm"] and layers["layers.1"][0] == "2 matrices"
    assert layers["layers.1"][1].norm == pytest.approx(math.hypot(finite.norm(), up.norm()), rel=1e-6)
    moment = source.read("embedding", whole((50, 8)), "exp_avg_sq")
    assert next(rows(source, None, "exp_avg_sq"))[2].norm == pytest.approx(float(moment.norm()), rel=1e-6)


def test_the_difference_is_where_the_checkpoints_differ(prepared, tmp_path, capsys):
    config = tiny(prepared, tmp_path)
    one = written(config, tmp_path / "a", 1)
    values = one.read("layers.1.down", whole((8, 24)))
    changed = values.clone()
    changed[3, 4] += 2
    other = written(config, tmp_path / "b", 2, layers_1_down=changed)
    differences = {name: found for name, _, found in rows(one, other)}
    assert [name for name, found in differences.items() if found.relative_difference] == ["layers.1"]
    assert differences["layers.1"].largest_difference == pytest.approx(2, rel=1e-6)
    norm = math.hypot(changed.norm(), other.read("layers.1.up", whole((24, 8))).norm())
    assert differences["layers.1"].relative_difference == pytest.approx(2 / norm, rel=1e-5)
    assert not any(found.relative_difference for _, _, found in rows(one, other, "exp_avg"))
    inspect(one.folder, against=other.folder, moments=True)
    said = capsys.readouterr().out
    assert "step 1, 7 tokens" in said and "phase a: 1 steps, 7 tokens: web 7" in said and "exp_avg_sq" in said and "largest" in said


# Memory


def test_safetensors_reads_what_is_written(tmp_path):
    tensors = {"half": torch.randn(3).bfloat16(), "vector": torch.randn(7), "matrix": torch.randn(5, 3).t(), "none": torch.randn(0, 4)}
    plan = [Planned(name, tensor.shape, tensor.dtype, lambda tensor=tensor: tensor) for name, tensor in tensors.items()]
    write_safetensors(tmp_path / "one.safetensors", plan, {"format": "pt"})
    read = load_file(tmp_path / "one.safetensors")
    assert read.keys() == tensors.keys() and all(read[name].equal(tensors[name]) for name in tensors)
    content = (tmp_path / "one.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for name, tensor in tensors.items():  # where a program that maps the file can use it
        assert (len(content) - sum(t.nbytes for t in tensors.values()) + header[name]["data_offsets"][0]) % tensor.itemsize == 0
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    write_shards(tmp_path, plan, 60, "writing")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6 + 28 + 60 and set(index["weight_map"].values()) == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / file)[name].equal(tensors[name])


MEASURE = """
import sys
from pathlib import Path
from megatron_jobs.conversion import convert

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

small, large, output = map(Path, sys.argv[1:])
convert.main(small, output / "hf_small", no_check=True)  # imports all
before = resident("VmRSS")
convert.main(large, output / "hf_large", no_check=True)
assert "torch.distributed" not in sys.modules or not sys.modules["torch.distributed"].is_initialized()
print("measured", before, resident("VmHWM"))
"""


def ramp(box: Box) -> torch.Tensor:
    return torch.arange(box.row0, box.row1)[:, None] / 2 + torch.arange(box.column0, box.column1) / 4096


def test_a_conversion_holds_little_more_than_the_largest_matrix(prepared, tmp_path):
    """A process of its own converts 400 MB that two tensor-parallel ranks have saved, to bf16; its peak is no further from where it began
    than three times the largest tensor and 32 MiB."""

    def save(folder: Path, num_layers: int) -> Path:
        size = dict(num_layers=num_layers, hidden_size=512, ffn_hidden_size=2048, num_attention_heads=8, num_query_groups=8)
        config = tiny(prepared, folder, model=size, train=dict(precision="bf16"))
        writer = Writer(folder, 1)
        writer.clear()
        for rank in range(2):
            pieces = []
            for name, (height, columns) in shapes(config.model, None):
                box = Box(rank * height // 2, (rank + 1) * height // 2, 0, columns)
                if name.endswith((".attention_out", ".down")):
                    box = Box(0, height, rank * columns // 2, (rank + 1) * columns // 2)
                read = partial(ramp, box)
                pieces.append(Planned(box_key("master", name, box), (box.rows, box.columns), torch.float32, read))
            writer.stream_rank_file(rank, pieces, lambda part: None)
        return writer.finish(config, 1, dict(shapes(config.model, None)), LEDGER)

    small, large = save(tmp_path / "small", 1), save(tmp_path / "large", 24)
    ended = subprocess.run([sys.executable, "-c", MEASURE, small, large, tmp_path], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    before, peak = map(int, ended.stdout.split("measured")[1].split())
    found = load_file(tmp_path / "hf_large/model.safetensors")
    whole_bytes = sum(tensor.nbytes for tensor in found.values())
    largest = max(tensor.nbytes for tensor in found.values())
    allowed = 3 * largest + 2**25
    print(f"{whole_bytes=:,} {largest=:,} {before=:,} {peak=:,} over={peak - before:,}")
    assert whole_bytes > 3 * allowed and peak - before <= allowed and peak <= 3 * largest + 2**30
    down = found["model.layers.23.mlp.down_proj.weight"]
    assert down.equal(ramp(Box(0, 512, 0, 2048)).to(down.dtype))
