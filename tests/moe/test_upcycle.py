"""Which matrix of the dense model each matrix of the mixture reads."""

import pytest

from moe.upcycle import Upcycled


class Names:
    """A source that answers with what it was asked for."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def read(self, name: str, box: object) -> tuple[str, str, object]:
        return self.kind, name, box


@pytest.mark.parametrize(
    "name, expected",
    [
        ("layers.3.experts.5.gate", ("dense", "layers.3.gate")),
        ("layers.31.experts.63.down", ("dense", "layers.31.down")),
        ("layers.3.router", ("new", "layers.3.router")),
        ("layers.3.query", ("dense", "layers.3.query")),
        ("embedding", ("dense", "embedding")),
    ],
)
def test_experts_are_the_dense_ffn_and_routers_are_new(name, expected):
    assert Upcycled(Names("dense"), Names("new")).read(name, "box") == (*expected, "box")
