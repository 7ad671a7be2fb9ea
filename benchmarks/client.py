"""What a request costs the client of servers: ours, with rendering and journal, beside others, against a scripted server.

    python -m benchmarks.client [--quick]        (some minutes; the first time it makes an environment of the peers below build/)

CPU time of the client's process alone, after imports and a warm-up; the server is another process, which answers at once. Every request
is a prompt of about 1,000 characters that nobody has sent before, and every answer of about 1,000 characters is kept: with 256 requests
in flight, rows are rendered, sent, parsed and written to a file by

    ours, journalled    mujina.answers: `Journalled` over `ServerAnswerer`
    ours                the same without a journal, the texts as lines
    aiohttp             one session, orjson, the texts as lines
    openai              AsyncOpenAI, the texts as lines
    datatrove           InferenceRunner with its cache of requests (SQLite) and its JSONL writer, a connection for each request

Medians of three, of one with --quick.
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PEERS = [
    "aiohttp==3.14.5",
    "orjson==3.13.0",
    "openai==3.51.0",
    "datatrove[io]==0.10.1",
    "aiosqlite==0.22.1",
    "aiofiles==25.1.0",
    "httpx==0.28.1",
]
NUM_REQUESTS = {"ours, journalled": 40_000, "ours": 40_000, "aiohttp": 20_000, "openai": 4_000, "datatrove": 4_000}
IN_FLIGHT, WARM_UP = 256, 500
ANSWER = "The badger digs at dusk, 夜に穴を掘ります。 " * 30
FACTS = "A badger lives in a sett, which its family has dug for generations. " * 13


def rendered(number: int) -> str:
    return f"Row {number}: you are a biologist, your reader is in grade {number % 9 + 1}. {FACTS} What does badger {number} do at dusk?"


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# The server.


class Served(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        import httptools

        self.transport, self.parser = transport, httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.transport.write(RESPONSE)  # type: ignore[attr-defined]
        if not self.parser.should_keep_alive():
            self.transport.close()


BODY = json.dumps(
    {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "teacher",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 250, "completion_tokens": 250, "total_tokens": 500},
    }
).encode()
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Served, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


# The clients: each goes through the requests from `first` to `last`, and keeps the answers in `folder`.


def ours(url: str, first: int, last: int, folder: Path) -> None:
    from mujina.answers import Answer, Request, Sampling, question
    from mujina.answers.server import ServerAnswerer

    sampling = Sampling(512, temperature=0.7)
    with open(folder / "answers.jsonl", "ab") as file:
        for number, found in ServerAnswerer(url, "teacher", IN_FLIGHT).ask(
            (number, Request(question(rendered(number)), sampling)) for number in range(first, last)
        ):
            assert isinstance(found, Answer)
            file.write(json.dumps([number, found.text]).encode() + b"\n")


def ours_journalled(url: str, first: int, last: int, folder: Path) -> None:
    from mujina.answers import Request, Sampling, question
    from mujina.answers.journal import Journalled, open_journal
    from mujina.answers.server import ServerAnswerer

    sampling = Sampling(512, temperature=0.7)
    with open_journal(folder / f"{first}.jsonl") as journal:
        answerer = Journalled(ServerAnswerer(url, "teacher", IN_FLIGHT), journal)
        for _ in answerer.ask((number, Request(question(rendered(number)), sampling)) for number in range(first, last)):
            pass
        assert journal.num_answers == last - first


async def in_flight(first: int, last: int, folder: Path, one: Callable[[int], Awaitable[str]]) -> None:
    """So many workers as requests may be in flight, which write the texts that `one` returns."""
    numbers = iter(range(first, last))
    with open(folder / "answers.jsonl", "ab") as file:

        async def work() -> None:
            for number in numbers:
                file.write(json.dumps([number, await one(number)]).encode() + b"\n")

        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))


def payload(number: int) -> dict[str, object]:
    messages = [{"role": "user", "content": rendered(number)}]
    return {"model": "teacher", "messages": messages, "max_tokens": 512, "temperature": 0.7, "top_p": 1.0, "seed": number}


def with_aiohttp(url: str, first: int, last: int, folder: Path) -> None:
    import aiohttp
    import orjson

    async def main() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=IN_FLIGHT)) as session:

            async def one(number: int) -> str:
                headers = {"Content-Type": "application/json"}
                async with session.post(f"{url}/chat/completions", data=orjson.dumps(payload(number)), headers=headers) as response:
                    text: str = orjson.loads(await response.read())["choices"][0]["message"]["content"]
                    return text

            await in_flight(first, last, folder, one)

    asyncio.run(main())


def with_openai(url: str, first: int, last: int, folder: Path) -> None:
    from openai import AsyncOpenAI

    async def main() -> None:
        async with AsyncOpenAI(base_url=url, api_key="none") as client:

            async def one(number: int) -> str:
                response = await client.chat.completions.create(**payload(number))
                text: str = response.choices[0].message.content
                return text

            await in_flight(first, last, folder, one)

    asyncio.run(main())


def with_datatrove(url: str, first: int, last: int, folder: Path) -> None:
    from datatrove.data import Document
    from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
    from datatrove.pipeline.writers import JsonlWriter
    from loguru import logger

    logger.remove()

    async def rollout(document, generate, **_):  # type: ignore[no-untyped-def]
        return await generate(payload(int(document.id)))

    config = InferenceConfig(
        server_type="endpoint",
        model_name_or_path="teacher",
        endpoint_url=url.removesuffix("/v1"),
        max_concurrent_generations=IN_FLIGHT,
        metric_interval=3600,
    )
    writer = JsonlWriter(str(folder / f"out-{first}"), output_filename="${rank}_${chunk_index}.jsonl", compression=None)
    runner = InferenceRunner(rollout, config, writer, checkpoints_local_dir=str(folder / f"checkpoints-{first}"))
    runner.run((Document(text=rendered(number), id=str(number)) for number in range(first, last)), 0, 1)


CLIENTS = {
    "ours, journalled": ours_journalled,
    "ours": ours,
    "aiohttp": with_aiohttp,
    "openai": with_openai,
    "datatrove": with_datatrove,
}


def measure(name: str, url: str, num_requests: int) -> None:
    """Prints the CPU seconds of so many requests."""
    with tempfile.TemporaryDirectory() as folder:
        CLIENTS[name](url, 0, WARM_UP, Path(folder))
        before = cpu_seconds()
        CLIENTS[name](url, WARM_UP, WARM_UP + num_requests, Path(folder))
        print(json.dumps(cpu_seconds() - before))


def peers() -> str:
    """The Python of an environment with the peers, which is made where there is none."""
    folder = ROOT / "build" / "client-peers"
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *PEERS], check=True)
        (folder / "done").touch()
    return str(python)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a request costs the client of servers, ours and others.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests, once")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, metavar=("NAME", "URL", "REQUESTS"), help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.serve:
        return asyncio.run(serve())
    if values.measure:
        name, url, number = values.measure
        return measure(name, url, int(number))

    of_peers, environment = peers(), {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    costs: dict[str, list[float]] = {name: [] for name in CLIENTS}
    try:
        for _ in range(1 if values.quick else 3):
            for name, number in NUM_REQUESTS.items():
                number = number // 10 if values.quick else number
                python, module = (sys.executable, ["-m", "benchmarks.client"]) if name.startswith("ours") else (of_peers, [__file__])
                command = [python, *module, "--measure", name, url, str(number)]
                done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                costs[name].append(json.loads(done.stdout.splitlines()[-1]) / number)
    finally:
        server.kill()
        server.wait()
    ours_costs = statistics.median(costs["ours, journalled"])
    print("| client | CPU µs a request | requests per CPU s | ours, journalled, is |\n| --- | --- | --- | --- |")
    for name, found in costs.items():
        cost = statistics.median(found)
        print(f"| {name} | {cost * 1e6:,.0f} | {1 / cost:,.0f} | {'' if name.startswith('ours') else f'{cost / ours_costs:.1f}×'} |")
    print(f"\n{', '.join(PEERS)}; Python {sys.version.split()[0]}; {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
