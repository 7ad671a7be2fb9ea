"""Predicts memory and speed of a run at a layout of processes, and searches the layouts for the fastest one that fits.

Needs no torch and no GPU: pure arithmetic on shapes.

    a step     = micro-batches × the slowest pipeline stage + pipeline bubble + gradient and weight exchange + optimizer
    a stage    = its layers, on the last one the output layer and the loss, and the messages to its neighbours
    a layer    = matrix products + attention + pointwise passes over memory + kernel gaps + tensor, context and expert exchange
    a product  = operations / (GEMM_SHARE × peak) + bytes / (MEMORY_SHARE × bandwidth): small ones are slow by their bytes

What differs between programs is in `Stack`, counted kernel by kernel. The numbers below are the same for all; GEMM_SHARE and DAY_SHARE were
fitted to published runs. tests/megatron_jobs/planning/test_planner.py holds the predictions against them and against runs that were
not looked at.
Not in the model: what adapters themselves compute, experts with unequal loads, documents that are kept apart (less attention), a batch
ramp, and the network's congestion.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from megatron_jobs.config import RunConfig
from megatron_jobs.planning import flops, layouts, memory
from megatron_jobs.planning.flops import GPU
from megatron_jobs.planning.memory import Memory
from mujina.user_input import UserError, nearest

GEMM_SHARE = 0.65  # of the peak, that a matrix product without memory traffic reaches (an H100 lowers its clock under this load)
MEMORY_SHARE = 0.80  # of the data sheet's bandwidth, that a streaming kernel reaches
LINK_SHARE = 0.75  # of NVLink's and the network's bandwidth, that a collective reaches
KERNEL_SECONDS = 5e-6  # between two kernels that depend on each other: launch, ramp-up, tail
HIDDEN_SHARE = 0.75  # of an exchange that runs beside computation, that costs nothing
DAY_SHARE = 0.95  # of a day that is training; the rest is checkpoints, validation and restarts


@dataclass(frozen=True)
class Stack:
    """How a training program does its work, as far as speed depends on it.

    Passes count how often a 2-byte value of a tensor crosses the memory in a forward and a backward pass, outside matrix products and
    attention; a 4-byte value counts twice.
    """

    hidden_passes: int  # of [tokens, hidden] in a layer: norms, rotary positions, residual sums
    ffn_passes: int  # of [tokens, ffn]: SwiGLU
    dispatch_passes: int  # of [tokens × top_k, hidden]: to the experts and back
    logit_passes: int  # of [tokens, vocabulary]: the loss
    kernels: int  # of a layer, forward and backward, without the experts'
    attention_share: float  # of the peak, that the fused attention kernel reaches
    gradient_bytes: int  # that cross the memory to add a weight's gradient of a micro-batch to the sum
    grouped_gemm: bool  # the experts of a rank in one kernel
    overlap: bool  # exchange of gradients, weights, tensor-parallel and pipeline messages beside computation


STACKS = {
    # Transformer Engine: a kernel each for norm, rotary positions and SwiGLU, cuDNN's attention, gradients summed inside the product.
    "transformer-engine": Stack(27, 8, 8, 10, 45, 0.55, 8, True, True),
    # Megatron at the beginning of 2024, as Tanuki was trained: a kernel an operation, FlashAttention-2, a separate gradient sum.
    "megatron-2024": Stack(165, 20, 16, 26, 170, 0.30, 8, False, False),
}
EXPERT_KERNELS = 25  # forward and backward
MICRO_BATCH_SIZES = (1, 2, 4, 8)  # that the search looks at


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind, and the program that they run."""

    gpus: int
    gpu: GPU
    gpus_per_node: int
    stack: Stack


@dataclass(frozen=True)
class Prediction:
    """Of a whole run, all phases together; the memory of the rank and the phase that need most."""

    config: RunConfig
    machine: Machine
    memory: Memory
    tokens: int
    seconds: float  # of training alone
    bubble: float  # share of the time in which pipeline stages wait for the first and the last micro-batch
    exchange: float  # share of the time in which only data moves between GPUs
    flops: float  # of the model, all GPUs

    @property
    def memory_gib(self) -> float:
        return self.memory.total / 2**30 + memory.FRAMEWORK_GIB

    @property
    def fits(self) -> bool:
        return self.memory_gib <= self.machine.gpu.memory_gib

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens / self.seconds / self.machine.gpus

    @property
    def tokens_per_day(self) -> float:
        return DAY_SHARE * 86_400 * self.tokens / self.seconds

    @property
    def flops_per_second_per_gpu(self) -> float:
        return self.flops / self.seconds / self.machine.gpus

    @property
    def mfu(self) -> float:
        """Model operations as a share of the peak of the run's precision."""
        gpu = self.machine.gpu
        return self.flops_per_second_per_gpu / (gpu.fp8 if self.config.train.precision == "fp8" else gpu.bf16)


def machine(gpus: int | None, gpu_name: str, gpus_per_node: int, stack_name: str) -> Machine:
    """From names, as they are given on the command line. Raises UserError for one that is not known."""
    gpu = flops.gpu(gpu_name)
    if gpu is None:
        raise UserError(f"--gpu ({gpu_name}): not known: there are: {', '.join(flops.GPUS)}")
    if stack_name not in STACKS:
        raise UserError(f"--stack ({stack_name}): not known: {nearest(stack_name, list(STACKS))}")
    if gpus is None:
        raise UserError(f"--gpu ({gpu_name}): how many? add --gpus, for example --gpus 128")
    return Machine(gpus, gpu, gpus_per_node, STACKS[stack_name])


def predict(config: RunConfig, machine: Machine) -> Prediction:
    """Memory and speed of the run as it is configured, on as many processes as there are GPUs; its layout is not checked here."""
    needed = _memory(config, machine.gpus)
    timings = {shape: _Timing(config, machine, *shape) for shape in _shapes(config)}
    tokens, seconds, bubble, exchange, operations = 0, 0.0, 0.0, 0.0, 0.0
    for phase in config.phases:
        timing = timings[phase.sequence_length, phase.global_batch_size]
        steps = phase.num_steps if phase.tokens else 1  # its sources are not there to tell: it counts next to nothing
        tokens += steps * phase.tokens_per_step
        seconds += steps * timing.step
        bubble += steps * timing.bubble
        exchange += steps * timing.exchange
        operations += steps * phase.tokens_per_step * flops.per_token(config.model, config.moe, phase.sequence_length)
    return Prediction(config, machine, needed, tokens, seconds, bubble / seconds, exchange / seconds, operations)


def _memory(config: RunConfig, gpus: int) -> Memory:
    return max((memory.fullest(config, gpus, *shape) for shape in _shapes(config)), key=lambda needed: needed.total)


def _shapes(config: RunConfig) -> set[tuple[int, int]]:
    return {(phase.sequence_length, phase.global_batch_size) for phase in config.phases}


def variants(config: RunConfig, gpus: int) -> Iterator[RunConfig]:
    """The configuration at every layout, micro-batch size and recomputation that can be on so many processes."""
    for size in MICRO_BATCH_SIZES:
        train = config.train.model_copy(update={"micro_batch_size": size})
        for parallel in layouts.nearest(config.model_copy(update={"train": train}), gpus):
            for recompute in ("none", "layers"):  # a fused attention keeps nothing that "attention" would save
                yield config.model_copy(update={"parallel": parallel, "train": train.model_copy(update={"recompute": recompute})})


@dataclass(frozen=True)
class Search:
    looked_at: int
    fitting: list[Prediction]  # the fastest first
    smallest: RunConfig  # the one that needs least memory


def search(config: RunConfig, machine: Machine) -> Search:
    """Raises UserError when no layout is possible on so many GPUs."""
    candidates = [(_memory(layout, machine.gpus).total, layout) for layout in variants(config, machine.gpus)]
    if not candidates:
        layouts.check(config, machine.gpus)  # says why, and what is near
    room = (machine.gpu.memory_gib - memory.FRAMEWORK_GIB) * 2**30
    fitting = [predict(layout, machine) for needed, layout in candidates if needed <= room]
    fitting.sort(key=lambda prediction: -prediction.tokens_per_second_per_gpu)
    return Search(len(candidates), fitting, min(candidates, key=lambda candidate: candidate[0])[1])


class _Timing:
    """The seconds of a step of one layout at one sequence length and global batch size."""

    def __init__(self, config: RunConfig, machine: Machine, sequence_length: int, global_batch_size: int) -> None:
        self.config, self.machine, self.gpu, self.stack = config, machine, machine.gpu, machine.stack
        self.sequence_length = sequence_length
        parallel = config.parallel
        micro_batches = global_batch_size // (config.train.micro_batch_size * parallel.data(machine.gpus))
        mixtures = flops.num_mixtures(config.model, config.moe) / parallel.pipeline  # on average
        dense = config.model.num_layers / parallel.pipeline - mixtures
        kinds = [(count, self._layer(mixture)) for count, mixture in ((dense, False), (mixtures, True)) if count]
        computed, exchanged = (sum(count * seconds[part] for count, seconds in kinds) for part in (0, 1))
        messages = self._pipeline_messages()
        stage = computed + exchanged + messages
        gradients = self._gradient_exchange(beside=stage)
        self.bubble = (parallel.pipeline - 1) * (computed + exchanged) / parallel.virtual_pipeline
        self.exchange = micro_batches * (exchanged + messages) + gradients
        # the last stage is the slowest: it has as many layers as the others, and the output layer
        self.step = micro_batches * (stage + self._output_layer()) + self.bubble + gradients + self._optimizer()

    @property
    def _tokens(self) -> float:
        """Of a micro-batch on one rank."""
        return self.config.train.micro_batch_size * self.sequence_length / self.config.parallel.context

    def _layer(self, mixture: bool) -> tuple[float, float]:
        """(computation, exchange that is not hidden) of a micro-batch in a layer, with or without experts, both ways, in seconds."""
        moe, parallel, stack = self.config.moe if mixture else None, self.config.parallel, self.stack
        tokens, tensor = self._tokens, parallel.tensor
        model = self.config.model.split_over(tensor)
        hidden, head = model.hidden_size, model.head_size
        heads, groups = model.num_attention_heads / tensor, model.num_query_groups / tensor

        products = self._product(tokens, hidden, (heads + 2 * groups) * head) + self._product(tokens, heads * head, hidden)
        values = stack.hidden_passes * tokens / tensor * hidden
        kernels: float = stack.kernels
        exchange = 0.0
        collectives = 8  # gather and scatter around attention and around the FFN, both ways
        ffn = moe.shared_ffn_hidden_size if moe else model.ffn_hidden_size  # that every token goes through
        if ffn:
            products += self._product(tokens, hidden, 2 * ffn / tensor) + self._product(tokens, ffn / tensor, hidden)
            values += stack.ffn_passes * tokens * ffn / tensor
        else:
            collectives = 4
        if moe:
            local, width = moe.num_experts / parallel.expert, moe.expert_width(model) / parallel.expert_tensor
            routed = tokens / tensor * moe.top_k  # copies of this rank's tokens
            rows = routed * parallel.expert_tensor / local  # of an expert, when the load is balanced
            products += local * (self._product(rows, hidden, 2 * width) + self._product(rows, width, hidden))
            products += self._product(tokens / tensor, hidden, moe.num_experts)
            values += stack.dispatch_passes * routed * hidden + stack.ffn_passes * local * rows * width
            kernels += EXPERT_KERNELS * (1 if stack.grouped_gemm else local)
            # to the experts and back, forward and backward; the ranks that split an expert share their tokens
            exchange += 4 * self._all_to_all(routed * hidden * 2, parallel.expert_tensor, parallel.expert)
            exchange += 4 * self._exchange(routed * parallel.expert_tensor * hidden * 2, 1, parallel.expert_tensor)
        attention = self._attention()
        computed = products + attention + self._stream(2 * values) + KERNEL_SECONDS * kernels
        gather = collectives * self._exchange(tokens * hidden * 2, 1, tensor)
        exchange += gather * (1 - HIDDEN_SHARE if stack.overlap else 1)
        # keys and values: gathered forward, gathered again and their gradients scattered backward
        exchange += 3 * self._exchange(tokens * parallel.context * 2 * groups * head * 2, tensor, parallel.context)
        if self.config.train.recompute == "attention":
            computed += attention / 3.5
        elif self.config.train.recompute == "layers":
            computed, exchange = computed * 4 / 3, exchange * 1.5
        return computed, exchange

    def _product(self, rows: float, inner: float, columns: float) -> float:
        """[rows, inner] × [inner, columns] forward, and the products of both gradients, of a frozen matrix of the input's, in seconds."""
        passes, gradient_bytes = (2, 0) if self.config.adapter else (3, self.stack.gradient_bytes)
        fp8 = self.config.train.precision == "fp8"
        size = 1 if fp8 else 2
        activations, weights = rows * (inner + columns), inner * columns
        traffic = passes * 2 * activations + 2 * size * weights + gradient_bytes * weights
        if fp8:  # inputs and gradients are cast, and once more transposed
            traffic += 5 * activations
        rate = self.gpu.fp8 if fp8 else self.gpu.bf16
        return 2 * passes * rows * inner * columns / (GEMM_SHARE * rate) + self._stream(traffic)

    def _attention(self) -> float:
        """Causal attention; the fused kernel computes the scores again in its backward pass: 3.5 times the forward pass, not 3."""
        tensor = self.config.parallel.tensor
        heads = self.config.model.split_over(tensor).num_attention_heads / tensor
        forward = 2 * self._tokens * self.sequence_length * heads * self.config.model.head_size
        return 3.5 * forward / (self.stack.attention_share * self.gpu.bf16)

    def _output_layer(self) -> float:
        model, tensor = self.config.model, self.config.parallel.tensor
        columns = model.padded_vocab_size / tensor
        return self._product(self._tokens, model.hidden_size, columns) + self._stream(2 * self.stack.logit_passes * self._tokens * columns)

    def _pipeline_messages(self) -> float:
        parallel = self.config.parallel
        if parallel.pipeline == 1:
            return 0.0
        one = self._tokens / parallel.tensor * self.config.model.hidden_size * 2 / (LINK_SHARE * self.gpu.network)
        hidden = HIDDEN_SHARE if self.stack.overlap and parallel.virtual_pipeline > 1 else 0.0
        return 2 * parallel.virtual_pipeline * one * (1 - hidden)

    def _gradient_exchange(self, beside: float) -> float:
        """float32 gradients are scattered, bf16 weights gathered; overlapped, they run beside the last and the first micro-batch."""
        parallel = self.config.parallel
        dense, experts = memory.trained(self.config, 0)
        copies = parallel.data(self.machine.gpus) * parallel.context
        time = self._exchange(6 * dense, parallel.tensor, copies)
        expert_ranks = parallel.expert * parallel.expert_tensor
        time += self._exchange(6 * experts, expert_ranks, copies * parallel.tensor // expert_ranks)
        return max(time * (1 - HIDDEN_SHARE), time - HIDDEN_SHARE * beside) if self.stack.overlap else time

    def _optimizer(self) -> float:
        """Clearing the gradients, and measuring them and AdamW on this rank's share of the parameters."""
        return self._stream(4 * sum(memory.trained(self.config, 0)) + (4 + 30) * memory.owned(self.config, self.machine.gpus, 0))

    def _stream(self, num_bytes: float) -> float:
        return num_bytes / (MEMORY_SHARE * self.gpu.memory_bandwidth)

    def _exchange(self, num_bytes: float, stride: int, size: int) -> float:
        """A gather or scatter of `num_bytes` in all, among `size` ranks that lie `stride` apart; a ring uses all their network cards."""
        if size == 1:
            return 0.0
        link = self.gpu.nvlink
        if stride * size > self.machine.gpus_per_node:
            link = min(link, self.gpu.network * max(1, self.machine.gpus_per_node // stride))
        return num_bytes * (size - 1) / size / (LINK_SHARE * link)

    def _all_to_all(self, num_bytes: float, stride: int, size: int) -> float:
        """Each of `size` ranks that lie `stride` apart sends `num_bytes`, evenly to all; what leaves the node takes its own card."""
        near = min(size, max(1, self.machine.gpus_per_node // stride))
        return num_bytes / LINK_SHARE * ((near - 1) / size / self.gpu.nvlink + (size - near) / size / self.gpu.network)


def show(config: RunConfig, machine: Machine, gpu_name: str, console: Console, best: int = 10) -> None:
    """Prints the run's own layout and the fastest ones that fit. Raises UserError, with what is missing, when none does."""
    found = search(config, machine)
    if not found.fitting:
        raise UserError(_nothing_fits(found, machine, gpu_name))
    table = Table(
        title=f"{machine.gpus} × {gpu_name}, {machine.gpus_per_node} a node; tokens/s and TFLOP/s of a GPU, batch: micro-batch size"
    )
    headings = "layout|batch|recompute|GiB|bubble|exchange|tokens/s|TFLOP/s|MFU|a day|days"
    for number, heading in enumerate(headings.split("|")):
        table.add_column(heading, justify="left" if number in (0, 2) else "right")
    try:
        layouts.check(config, machine.gpus)
        own = predict(config, machine)
        table.add_row(*_row(own), style="" if own.fits else "red")
        parts = {name: size / 2**30 for name, size in vars(own.memory).items()} | {"framework": memory.FRAMEWORK_GIB}
        console.print("memory            " + ", ".join(f"{name} {gib:.1f}" for name, gib in parts.items()) + " GiB on the fullest GPU")
        if not own.fits:
            console.print(f"the configured layout does not fit: {own.memory_gib:.1f} GiB of {machine.gpu.memory_gib:.1f}")
    except UserError as error:
        console.print(f"the configured layout is not possible: {error}")
    table.add_section()
    for prediction in found.fitting[:best]:
        table.add_row(*_row(prediction))
    console.print(table)
    console.print(f"{found.looked_at:,} layouts were looked at, {len(found.fitting):,} fit; the first row is the configured one")


def _row(prediction: Prediction) -> list[str]:
    sizes, train = prediction.config.parallel, prediction.config.train
    names = {"TP": sizes.tensor, "PP": sizes.pipeline, "VPP": sizes.virtual_pipeline, "CP": sizes.context}
    names |= {"EP": sizes.expert, "ETP": sizes.expert_tensor}
    names = {name: size for name, size in names.items() if size > 1} | {"DP": sizes.data(prediction.machine.gpus)}
    return [
        " ".join(f"{name}{size}" for name, size in names.items()),
        str(train.micro_batch_size),
        train.recompute,
        f"{prediction.memory_gib:.1f}",
        f"{prediction.bubble:.1%}",
        f"{prediction.exchange:.1%}",
        f"{prediction.tokens_per_second_per_gpu:,.0f}",
        f"{prediction.flops_per_second_per_gpu / 1e12:.0f}",
        f"{prediction.mfu:.1%}",
        f"{prediction.tokens_per_day / 1e9:.1f} B",
        f"{prediction.tokens / prediction.tokens_per_day:.1f}" if all(phase.tokens for phase in prediction.config.phases) else "?",
    ]


def _nothing_fits(found: Search, machine: Machine, gpu_name: str) -> str:
    smallest = predict(found.smallest, machine)
    largest = max(vars(smallest.memory).items(), key=lambda part: part[1])
    larger = [name for name, gpu in flops.GPUS.items() if gpu.memory_gib >= smallest.memory_gib]
    remedies = [f"more GPUs than {machine.gpus}"] + ([f"larger ones ({', '.join(larger)})"] if larger else [])
    return (
        f"--gpus ({machine.gpus} × {gpu_name}): none of {found.looked_at:,} layouts fits; the smallest ({_row(smallest)[0]}, micro-batch "
        f"{smallest.config.train.micro_batch_size}, recompute {smallest.config.train.recompute}) needs {smallest.memory_gib:.1f} GiB of "
        f"{machine.gpu.memory_gib:.1f}, {largest[1] / 2**30:.1f} of it {largest[0]}: take {' or '.join(remedies)}"
    )
