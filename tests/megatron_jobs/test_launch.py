"""The port at which the processes of a run meet is taken before they are started."""

import socket

import pytest

from megatron_jobs.launch import held_port


def test_a_held_port_is_for_the_store_of_rank_0_alone():
    from torch.distributed import TCPStore

    with held_port() as port:
        with socket.socket() as another, pytest.raises(OSError, match="Address already in use"):
            another.bind(("127.0.0.1", port))
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        store.set("met", "here")
        assert TCPStore("127.0.0.1", port, is_master=False).get("met") == b"here"
