"""Headers of safetensors files: what the library writes is read, what is written here the library reads, and rubbish is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mujina.tensor_files import METADATA, Planned, header, read_header, write_safetensors


def test_a_header_tells_where_the_librarys_values_are(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.tensor([7, 8], dtype=torch.int64)}
    save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
    about, start = read_header(tmp_path / "file")
    assert about.pop(METADATA) == {"format": "pt"} and about.keys() == tensors.keys()
    assert about["a"]["dtype"] == "F32" and about["a"]["shape"] == [2, 3]
    content = (tmp_path / "file").read_bytes()
    for name, tensor in tensors.items():
        first, last = (start + offset for offset in about[name]["data_offsets"])
        assert content[first:last] == tensor.numpy().tobytes()


def test_the_library_reads_what_is_written_here(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(5).to(torch.bfloat16), "none": torch.empty(0, 4)}
    planned = [Planned(name, tensor.shape, tensor.dtype, lambda tensor=tensor: tensor) for name, tensor in tensors.items()]
    write_safetensors(tmp_path / "file", planned, {"format": "pt"})
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    (tmp_path / "bytes").write_bytes(header([("x", "F8_E4M3", [3], 3)]) + b"\0\0\0")
    assert read_header(tmp_path / "bytes")[0] == {"x": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1\2",
        (2**62).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"{no}",
        (2).to_bytes(8, "little") + b"[]",
        b"\xff" * 99,
    ],
)
def test_what_has_no_header_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError):
        read_header(tmp_path / "file")


def test_headers_need_no_torch() -> None:
    code = "import json, sys, mujina.tensor_files, tokenization.extend, tokenization.load; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert not {"torch", "transformers", "safetensors"} & set(json.loads(done.stdout))
