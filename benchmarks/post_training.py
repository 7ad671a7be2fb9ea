"""Post-training against its peers: SFT and DPO against TRL's trainers, LoRA against peft, in float32 on a CPU.

    python -m benchmarks.post_training [--json FILE]        (the table of a run is in RESULTS.md)

The peers (`trl_side.py`, tests/trl.txt) get what our runs have: the first weights, the tokens of each step, the learning rates, the
constants of AdamW. They live in a folder of their own, which is made where it is missing: .venv/trl.

What is not alike by itself, and what is done about it:

    order, batches     TRL shuffles, and takes so many dialogues a step: it gets the dialogues of our packs
    packs              TRL's attention on a CPU (sdpa) keeps documents apart by their positions: it gets our packs, and once the same
                       dialogues one by one
    learning rate      TRL's warm-up begins with a step of rate 0: it gets our rates
    label smoothing    TRL's `sigmoid` leaves it out, and `robust` is another formula; `aot` of one pair at a time is ours
    NLL of chosen      TRL's `sft` is a mean over the tokens of a batch, ours a mean by answer: of one pair at a time they are the same
    experts            transformers has gate and up of all experts in one parameter, and peft one A for both: it gets twice the rank, in
                       two blocks, and what lies outside of them in B stays zero
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from mujina.matrices import Box
from tests.megatron_jobs.test_train import train_here
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
PEERS = Path(sys.prefix) / "trl"
WORDS = "山 川 東京 データ 学習 言語 the of model token data train phase expert router and is 1 2 3 + = def return self".split()
LENGTH, BATCH, NUM_STEPS, BETA = 128, 4, 20, 0.3  # tokens of a sample, samples of a step, steps at least
MODEL = dict(num_layers=4, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4, num_query_groups=2, init_std=0.05)
MOE = dict(num_experts=4, top_k=2, balancing="none", router_z_loss=0.0)
ATTENTION = ["query", "key", "value", "attention_out"]
ADAPTERS = {
    "llama": dict(rank=4, alpha=8, matrices=[*ATTENTION, "gate", "up", "down"]),
    "mixtral": dict(rank=4, alpha=8, matrices=[*ATTENTION, "experts.gate", "experts.up", "experts.down"]),
}
LAYOUTS: dict[str, list[dict[str, int]]] = {
    "llama": [{}, {"tensor": 2}, {"pipeline": 2}],
    "mixtral": [{}, {"tensor": 2}, {"pipeline": 2}, {"expert": 2}],
}
# By the form of our loss: what of its section is set, and what gives the same in TRL.
PREFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo": ({}, {"loss_type": ["sigmoid"]}),
    "ipo": ({"form": "ipo"}, {"loss_type": ["ipo"]}),
    "smoothed": (
        {"label_smoothing": 0.1, "nll_weight": 0.2},
        {"label_smoothing": 0.1, "loss_type": ["aot", "sft"], "loss_weights": [1.0, 0.2]},
    ),
}
REWARDS = {"chosen_reward": "rewards/chosen", "rejected_reward": "rewards/rejected", "reward_margin": "rewards/margins"}
AT_FIRST = {"loss": "loss", "chosen_log_probability": "logps/chosen", "rejected_log_probability": "logps/rejected"}
TOKENS = [[(7 * row + 3 * place) % 300 for place in range(64)] for row in range(2)]  # whose logits are compared

Steps = list[dict[str, Any]]  # one dict a step, of what it told


def write_sources(folder: Path, chat: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> None:
    """A tokenizer of 320 pieces, and token binaries of these dialogues and pairs."""
    from data_prep.prepare import PrepareConfig, prepare
    from tokenization.train import TrainConfig, train

    for name, rows in (("chat", chat), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    train(TrainConfig(inputs=[str(folder / "chat.jsonl")], output=str(folder / "tokenizer"), vocab_size=320, character_coverage=1.0))
    sources = {
        "chat": {"documents": [str(folder / "chat.jsonl")], "kind": "chat", "origin": "rule", "answer_weights": True},
        "pairs": {"documents": [str(folder / "pairs.jsonl")], "kind": "preferences", "origin": "rule"},
    }
    prepare(PrepareConfig.model_validate({"tokenizer": str(folder / "tokenizer"), "output": str(folder / "data"), "sources": sources}))


def make_inputs(folder: Path) -> None:
    """A tokenizer, dialogues and pairs as token binaries, and the first weights of a Llama and a Mixtral, as transformers draws them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    from tokenization.load import load as load_tokenizer

    draw = random.Random(1)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=max(1, min(40, round(draw.lognormvariate(2, 0.7))))))

    def rounds() -> Iterator[dict[str, str]]:
        for _ in range(draw.randint(1, 2)):
            yield from ({"role": role, "content": text()} for role in ("user", "assistant"))

    chat = [{"messages": list(rounds())} for _ in range(280)]
    pairs = [{"messages": [{"role": "user", "content": text()}], "chosen": f"{text()} {n}", "rejected": text()} for n in range(180)]
    write_sources(folder, chat, pairs)
    sizes = dict(
        vocab_size=load_tokenizer(folder / "tokenizer").vocab_size,
        hidden_size=MODEL["hidden_size"],
        intermediate_size=MODEL["ffn_hidden_size"],
        num_hidden_layers=MODEL["num_layers"],
        num_attention_heads=MODEL["num_attention_heads"],
        num_key_value_heads=MODEL["num_query_groups"],
        initializer_range=MODEL["init_std"],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "llama")
    experts = dict(num_local_experts=MOE["num_experts"], num_experts_per_tok=MOE["top_k"], router_aux_loss_coef=0.0)
    MixtralForCausalLM(MixtralConfig(**sizes, **experts, tie_word_embeddings=False)).save_pretrained(folder / "mixtral")


def configured(folder: Path, name: str, loss: dict[str, Any], model: str = "llama", **sections: Any) -> dict[str, Any]:
    """The configuration of a run."""
    from tokenization.load import load as load_tokenizer

    phase = dict(
        name="all",
        sequence_length=LENGTH,
        global_batch_size=BATCH,
        sources={"pairs" if loss["kind"] == "preference" else "chat": {"epochs": 1}},
        learning_rate=dict(start=1e-2 if "adapter" in sections else 2e-3, end=2e-4, shape="cosine", warmup_steps=3),
        loss=loss | {"too_long": "drop"},
    )
    return {
        "run": str(folder / "runs" / name),
        "tokenizer": str(folder / "tokenizer"),
        "model": MODEL | {"vocab_size": load_tokenizer(folder / "tokenizer").vocab_size},
        "moe": MOE if model == "mixtral" else None,
        "data": dict(folder=str(folder / "data"), block_length=LENGTH),
        # every checkpoint is kept, for the gradient of the first step
        "train": dict(micro_batch_size=1, precision="fp32", init_from=str(folder / model), checkpoint_interval=1, keep_checkpoints=100),
        "phases": [phase],
    } | sections


def train_ours(values: dict[str, Any]) -> Steps:
    from megatron_jobs.config import from_dict

    config = from_dict(values, "the benchmark")
    sizes = config.parallel
    run_ranks(max(sizes.tensor * sizes.pipeline, sizes.expert), train_here, config)
    return [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]


def train_theirs(folder: Path, jobs: dict[str, dict[str, Any]]) -> dict[str, Steps]:
    files = {name: folder / f"peer_{name}.json" for name in jobs}
    for name, file in files.items():
        file.write_text(json.dumps(jobs[name]))
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.trl_side", *map(str, files.values())]
    subprocess.run(command, check=True, cwd=ROOT, env=environment_of_peers(), stdout=subprocess.DEVNULL)
    return {name: json.loads((file.with_suffix("") / "steps.json").read_text()) for name, file in files.items()}


def environment_of_peers() -> dict[str, str]:
    """Of the peers' processes. Makes their folder where it is missing."""
    if not (PEERS / "trl").exists():
        install = ["install", "-q", "--disable-pip-version-check", "--no-deps", "--target", str(PEERS)]
        subprocess.run([sys.executable, "-m", "pip", *install, "-r", str(ROOT / "tests/trl.txt")], check=True)
    return os.environ | {"PYTHONPATH": f"{PEERS}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}


def versions() -> str:
    ours = [f"{name} {version(name)}" for name in ("torch", "transformers", "megatron-core")]
    return ", ".join([*ours, *sorted(path.name.removesuffix(".dist-info").replace("-", " ") for path in PEERS.glob("*.dist-info"))])


def job(values: dict[str, Any], packed: bool = False, **options: Any) -> dict[str, Any]:
    """What `trl_side.py` needs to make the steps of a run."""
    from megatron_jobs.check import check
    from megatron_jobs.config import from_dict
    from megatron_jobs.data import feeder, phases

    config, order = check(from_dict(values | {"parallel": {}, "run": f"{values['run']}-not-begun"}, "the benchmark"), 1)
    binaries, is_dpo = feeder.open_sources(config), config.phases[0].loss.kind == "preference"

    def dialogue(source: str, document: int) -> tuple[list[int], list[int]]:
        """Ids, and labels as TRL has them: -100 where nothing is to be learnt."""
        start, end = binaries[source].bounds(document)
        ids = binaries[source].read(start, end - start).tolist()
        said = binaries[source].read_channel("weights", start, end - start)
        return ids, [-100, *(token if weight else -100 for token, weight in zip(ids[1:], said[1:], strict=True))]

    def pair(source: str, number: int) -> dict[str, list[int]]:
        sides = [dialogue(source, 2 * number + side) for side in (0, 1)]
        size = next(place for place, label in enumerate(sides[0][1]) if label >= 0)
        assert all(max(labels[:size]) == -100 and min(labels[size:]) >= 0 and ids[:size] == sides[0][0][:size] for ids, labels in sides)
        return {"prompt_ids": sides[0][0][:size], "chosen_ids": sides[0][0][size:], "rejected_ids": sides[1][0][size:]}

    def rows(step: int) -> Iterator[dict[str, list[int]]]:
        for source, numbers in order.samples(step, range(BATCH)):
            if is_dpo:
                yield from (pair(source, number) for number in numbers)
                continue
            dialogues = [dialogue(source, number) for number in numbers]
            if packed and dialogues:
                ids, labels = (sum(several, []) for several in zip(*dialogues, strict=True))
                yield {"input_ids": ids, "labels": labels, "seq_lengths": [len(ids) for ids, _ in dialogues]}
            else:
                yield from ({"input_ids": ids, "labels": labels} for ids, labels in dialogues)

    steps = range(phases.num_steps(config.phases))
    return {
        "kind": "dpo" if is_dpo else "sft",
        "model": str(config.train.init_from),
        "steps": [list(rows(step)) for step in steps],
        "learning_rates": [phases.learning_rate(config.phases, step) for step in steps],
        "optimizer": config.optimizer.model_dump(),
        "options": options | ({"padding_free": True} if packed else {}) | ({"beta": BETA} if is_dpo else {}),
        "adapter": None,
    }


def adapter_of(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The adapter that a run began with, and the one that it ended with, for a job."""
    from safetensors.torch import save_file

    from megatron_jobs.checkpoints.checkpoint import Checkpoint
    from megatron_jobs.checkpoints.weights import InitialAdapter
    from megatron_jobs.config import from_dict

    config, files = from_dict(values, "the benchmark"), {}
    for when, source in (("start", InitialAdapter(config)), ("end", Checkpoint(config.run / "checkpoints/latest"))):
        files[when] = str(folder / f"{config.run.name}_{when}.safetensors")
        save_file({name: source.read(name, Box(0, rows, 0, columns)) for name, (rows, columns) in source.shapes.items()}, files[when])
    return {"rank": values["adapter"]["rank"], "alpha": values["adapter"]["alpha"], "tokens": TOKENS} | files


def row(what: str, against: str, bound: float, found: float) -> dict[str, Any]:
    print(f"{what}, against {against}: {found:.1e} (to reach: {bound:.0e})", flush=True)
    return {"what": what, "against": against, "to_reach": bound, "found": found}


def furthest(ours: Steps, theirs: Steps, names: dict[str, str]) -> float:
    """The largest difference of a step, relative."""
    assert len(ours) == len(theirs)
    return max(abs(a[mine] - b[its]) / abs(b[its]) for a, b in zip(ours, theirs, strict=True) for mine, its in names.items())


def sft(folder: Path) -> Iterator[dict[str, Any]]:
    values = configured(folder, "sft", {"kind": "answers"})
    ours = train_ours(values)
    assert len(ours) >= NUM_STEPS
    theirs = train_theirs(folder, {"one by one, padded": job(values), "our packs": job(values, packed=True)})
    for how, steps in theirs.items():
        yield row(f"SFT: loss, {len(ours)} steps", f"SFTTrainer, {how}", 1e-4, furthest(ours, steps, {"loss": "loss"}))
        yield row(f"SFT: gradient norm, {len(ours)} steps", f"SFTTrainer, {how}", 1e-4, furthest(ours, steps, {"grad_norm": "grad_norm"}))


def dpo(folder: Path) -> Iterator[dict[str, Any]]:
    runs = {}
    for name, (loss, options) in PREFERENCES.items():
        values = configured(folder, name, {"kind": "preference", "beta": BETA} | loss)
        runs[name] = train_ours(values), job(values, **options)
        assert len(runs[name][0]) >= NUM_STEPS
    theirs = train_theirs(folder, {name: its for name, (_, its) in runs.items()})
    for name, (ours, its) in runs.items():
        peer, against = theirs[name], f"DPOTrainer, {' and '.join(its['options']['loss_type'])}"

        def rewards_apart(ours: Steps, peer: Steps) -> float:
            return max(abs(a[mine] - b[other]) for a, b in zip(ours, peer, strict=True) for mine, other in REWARDS.items())

        yield row(f"{name}: loss and log-probabilities at step 0", against, 1e-5, furthest(ours[:1], peer[:1], AT_FIRST))
        yield row(f"{name}: rewards at step 0, absolute", against, 1e-5, rewards_apart(ours[:1], peer[:1]))
        yield row(f"{name}: gradient at step 0, of the worst matrix", against, 1e-5, gradients_apart(folder, name))
        yield row(f"{name}: loss, {len(ours)} steps", against, 1e-4, furthest(ours, peer, {"loss": "loss"}))
        margin = max(abs(step["rewards/margins"]) for step in peer)
        yield row(f"{name}: rewards, {len(ours)} steps, of the largest margin", against, 1e-4, rewards_apart(ours, peer) / margin)


def gradients_apart(folder: Path, name: str) -> float:
    """The gradient of the first step, clipped, which is what AdamW's first moment holds after it: |difference| / |gradient| of a matrix."""
    from safetensors.torch import load_file

    from megatron_jobs.checkpoints.checkpoint import Checkpoint
    from megatron_jobs.conversion.families import LLAMA, hugging_face_name

    checkpoint = Checkpoint(folder / "runs" / name / "checkpoints/step-00000001")
    theirs, apart = load_file(folder / f"peer_{name}" / "gradient.safetensors"), []
    for matrix, (rows, columns) in checkpoint.shapes.items():
        its = theirs[hugging_face_name(matrix, LLAMA)].view(-1, columns)
        own = checkpoint.read(matrix, Box(0, rows, 0, columns), "exp_avg")[: len(its)] / (1 - checkpoint.config.optimizer.beta1)
        apart.append(float((own - its).norm() / its.norm()))
    return max(apart)


def lora(folder: Path) -> Iterator[dict[str, Any]]:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from megatron_jobs.conversion import convert

    runs, jobs = {}, {}
    for model, layouts in LAYOUTS.items():
        for parallel in layouts:
            name = " ".join([model, *(f"{kind} {size}" for kind, size in parallel.items())])
            values = configured(folder, name, {"kind": "answers"}, model, adapter=ADAPTERS[model], parallel=parallel)
            runs[name] = train_ours(values)
        values = configured(folder, model, {"kind": "answers"}, model, adapter=ADAPTERS[model])
        jobs[model] = job(values) | {"adapter": adapter_of(folder, values)}
    theirs = train_theirs(folder, jobs)
    for name, ours in runs.items():
        yield row(
            f"LoRA, {name}: loss, {len(ours)} steps", "peft, SFTTrainer", 1e-4, furthest(ours, theirs[name.split()[0]], {"loss": "loss"})
        )
    for model in LAYOUTS:
        run_ranks(1, convert.main, folder / "runs" / model / "checkpoints/latest", folder / f"merged_{model}", True)
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder / f"merged_{model}", dtype=torch.float32)(torch.tensor(TOKENS)).logits
        its = load_file(folder / f"peer_{model}" / "logits.safetensors")["logits"]
        yield row(
            f"LoRA, {model}: logits, merged",
            "merge_and_unload of the same A and B",
            1e-5,
            float((logits - its).abs().max() / its.abs().max()),
        )


def main(json_file: Annotated[Path | None, typer.Option("--json", help="also write the figures here")] = None) -> None:
    """Trains both sides and prints the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        rows = [row for part in (sft, dpo, lora) for row in part(folder)]
    print(f"\n{versions()}\n")
    print("| what | against | to reach | found |\n| --- | --- | --- | --- |")
    for each in rows:
        print(f"| {each['what']} | {each['against']} | {each['to_reach']:.0e} | {each['found']:.1e} |")
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
