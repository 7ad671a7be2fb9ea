"""Predicts the memory of a process in training, in bytes, from the shapes alone. Needs no torch.

Counted are the tensors of `state.py` and those that the layers of `gpt.py` keep for the backward pass. Two kinds of layers are known:
Transformer Engine's (on a GPU), and the local ones (on a CPU, and on a GPU without Transformer Engine), which keep more: RMSNorm its
input and the normalised input in float32, SwiGLU of experts every step.
tests/megatron_jobs/planning/test_memory.py holds the local ones against what a training step allocates.

Letters: T tokens of a micro-batch on a rank (split over `context`; `tensor` splits everything else, as it is sequence parallel too).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_jobs.config import SOFTMAX_AT_ONCE, RunConfig
from megatron_jobs.config.adapter import ATTENTION, FFN
from megatron_jobs.config.model import ModelConfig
from megatron_jobs.planning import flops

FRAMEWORK_GIB = 4.0  # on a GPU: CUDA context, cuBLAS and NCCL buffers, and what the allocator cannot use


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. `buffers` is what a backward pass needs for a moment: gradients of logits and of the largest matrices."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def parameters(config: RunConfig, stage: int) -> tuple[float, float]:
    """(dense, expert) parameters on a rank of a pipeline stage."""
    moe, parallel = config.moe, config.parallel
    model = config.model.split_over(parallel.tensor)
    hidden, mixtures = model.hidden_size, mixtures_of(config, stage)
    layers = model.num_layers // parallel.pipeline
    biases, norms = attention_vectors(model)
    attention = 2 * hidden * model.head_size * (model.num_attention_heads + model.num_query_groups) + biases
    first, last = stage == 0, stage == parallel.pipeline - 1
    matrices = int(first) + int(last and not (first and model.tie_embeddings))
    dense = layers * (attention / parallel.tensor + norms + 2 * hidden) + hidden * last
    dense += (matrices * model.padded_vocab_size * hidden + (layers - mixtures) * 3 * hidden * model.ffn_hidden_size) / parallel.tensor
    if moe is None:
        return dense, 0.0
    dense += mixtures * hidden * (moe.num_experts + 3 * moe.shared_ffn_hidden_size / parallel.tensor)
    experts = mixtures * moe.num_experts * 3 * hidden * moe.expert_width(model)
    return dense, experts / (parallel.expert * parallel.expert_tensor)


def trained(config: RunConfig, stage: int) -> tuple[float, float]:
    """(dense, expert) parameters on a rank of a pipeline stage that have gradients: all, or those of the adapter, which every rank holds
    whole."""
    if config.adapter is None:
        return parameters(config, stage)
    moe, parallel = config.moe, config.parallel
    layers, mixtures = config.model.num_layers // parallel.pipeline, mixtures_of(config, stage)
    dense = layers * _adapters(config, ATTENTION) + (layers - mixtures) * _adapters(config, FFN)
    if moe is None:
        return dense, 0.0
    dense += mixtures * _adapters(config, [f"shared.{name}" for name in FFN])
    experts = mixtures * _adapters(config, [f"experts.{name}" for name in FFN])
    if config.adapter.experts == "shared":
        return dense + experts, 0.0
    return dense, experts * moe.num_experts / parallel.expert


def _adapters(config: RunConfig, kinds: Sequence[str]) -> float:
    """Parameters of the adapters of matrices of a layer, each expert's own."""
    model, moe, adapter = config.model, config.moe, config.adapter
    assert adapter is not None
    hidden = model.hidden_size
    others = {name: model.num_attention_heads * model.head_size for name in ("query", "attention_out")}
    others |= {name: model.num_query_groups * model.head_size for name in ("key", "value")} | dict.fromkeys(FFN, model.ffn_hidden_size)
    if moe is not None:
        others |= {f"shared.{name}": moe.shared_ffn_hidden_size for name in FFN}
        others |= {f"experts.{name}": moe.expert_width(model) for name in FFN}
    return sum(adapter.rank_of(kind) * (hidden + others[kind]) for kind in kinds if kind in adapter.matrices)


def attention_vectors(model: ModelConfig) -> tuple[int, int]:
    """(biases, norms) of queries, keys and values in a layer."""
    heads = model.num_attention_heads + 2 * model.num_query_groups
    return heads * model.head_size * model.qkv_bias, 2 * model.head_size * model.qk_norm


def mixtures_of(config: RunConfig, stage: int) -> int:
    """Layers with experts in a pipeline stage, which has every so many of the model's chunks of layers."""
    if config.moe is None:
        return 0
    pipeline, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline
    size = config.model.num_layers // (pipeline * virtual)
    return sum(config.moe.is_mixture(layer) for layer in range(config.model.num_layers) if layer // size % pipeline == stage)


def owned(config: RunConfig, gpus: int, stage: int) -> float:
    """Parameters whose float32 state this rank keeps: the distributed optimizer shares them among the ranks with the same parameters."""
    dense, experts = trained(config, stage)
    parallel = config.parallel
    copies = parallel.data(gpus) * parallel.context
    return dense / copies + experts * parallel.expert * parallel.expert_tensor / (copies * parallel.tensor)


def of_stage(config: RunConfig, gpus: int, stage: int, sequence_length: int, global_batch_size: int, fused: bool) -> Memory:
    """The memory of a rank of a pipeline stage; `fused`: with Transformer Engine's layers."""
    model, parallel, train = config.model, config.parallel, config.train
    size = 4 if train.precision == "fp32" else 2
    tokens = train.micro_batch_size * sequence_length / parallel.context
    num_trained = sum(trained(config, stage))
    num_parameters = sum(parameters(config, stage)) + (num_trained if config.adapter else 0)
    micro_batches = global_batch_size // (train.micro_batch_size * parallel.data(gpus))

    layers, mixtures = model.num_layers // parallel.pipeline, mixtures_of(config, stage)
    sizes = [layer(config, tokens, fused, mixture) for mixture, count in ((False, layers - mixtures), (True, mixtures)) if count]
    per_layer = ((layers - mixtures) * sizes[0] + mixtures * sizes[-1]) / layers
    kept = tokens * model.hidden_size * size / parallel.tensor if train.recompute == "layers" else per_layer
    activations = layers / parallel.virtual_pipeline * kept * chunks_in_flight(config, micro_batches, stage)
    # the layer that is just computed again, or the gradients inside the layer that is just gone through
    buffers = max(sizes) if train.recompute == "layers" else _largest_gradients(config, tokens, size)
    # the gradient of the embedding, or of the output
    vocabulary = 0 if config.adapter else size * model.padded_vocab_size * model.hidden_size / parallel.tensor
    if stage == parallel.pipeline - 1:
        logits = tokens * model.padded_vocab_size / parallel.tensor
        activations += size * logits + _norm(config, tokens, size, fused, config.adapter is None)
        softmax = 4 * min(logits, SOFTMAX_AT_ONCE["cuda" if fused else "cpu"])  # a part of it
        if config.adapter:  # with its gradient; when the layers' turn comes, the logits are gone
            buffers = max(buffers - size * logits, 2 * softmax)
        else:  # its gradient takes the place of the logits; then the gradient of the matrix
            buffers = max(buffers, softmax, vocabulary)
    message = tokens * model.hidden_size * size / parallel.tensor
    buffers += 2 * message * parallel.tensor * (parallel.tensor > 1)  # gathered input, and its gradient
    buffers += 4 * message * (parallel.pipeline > 1)  # received and sent, and their gradients
    if not fused and parallel.data(gpus) * parallel.context > 1:  # gloo copies the gradients to sum them, once the activations are gone
        buffers = max(buffers, 4 * max(trained(config, stage)) + vocabulary * (stage == 0) - activations)
    weights = num_parameters * (4 if train.precision == "fp8" else size)  # fp8: Transformer Engine's copies, as they are and transposed
    return Memory(weights, 4 * num_trained, owned(config, gpus, stage) * (8 if size == 4 else 12), activations, buffers)


def fullest(config: RunConfig, gpus: int, sequence_length: int, global_batch_size: int, fused: bool = True) -> Memory:
    """The memory of the rank that needs most: of the first pipeline stage, or of the last."""
    stages = {0, config.parallel.pipeline - 1}
    return max((of_stage(config, gpus, stage, sequence_length, global_batch_size, fused) for stage in stages), key=lambda m: m.total)


def chunks_in_flight(config: RunConfig, micro_batches: int, stage: int) -> int:
    """Chunks of layers whose activations a stage holds at most, in megatron-core's schedules (Narayanan et al. 2021, arXiv 2104.04473)."""
    pipeline, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline
    ahead = pipeline - stage - 1
    if virtual > 1:
        ahead = 2 * ahead + (virtual - 1) * pipeline
    return min(ahead + 1, micro_batches * virtual)


def layer(config: RunConfig, tokens: float, fused: bool, mixture: bool) -> float:
    """Bytes that a layer, with or without experts, keeps of a micro-batch on a rank for its backward pass."""
    model, moe = config.model.split_over(config.parallel.tensor), config.moe
    size = 4 if config.train.precision == "fp32" else 2
    heads, groups = model.num_attention_heads * model.head_size, model.num_query_groups * model.head_size
    attention = 2 * heads + 2 * groups  # queries, keys, values, output
    if fused or config.train.recompute == "attention":
        attention += heads + groups  # the product that they were cut from, of which the values are a view
    elif config.parallel.context > 1:  # gathered, and a copy for each head
        attention = 2 * heads * (1 + config.parallel.context)
    attention = attention * size + 4 * model.num_attention_heads  # and the softmax's normaliser
    per_token = attention / config.parallel.tensor
    result = tokens * per_token + _norm(config, tokens, size, fused, _keeps_input(config, "query", "key", "value"))
    of_ffn = ("experts.gate", "experts.up", "shared.gate", "shared.up") if mixture else ("gate", "up")
    result += _norm(config, tokens, size, fused, _keeps_input(config, *of_ffn))
    if config.adapter:
        result += size * sum(_kept_by_adapters(config, tokens, mixture))
    if not fused:
        result += 4 * tokens * model.head_size * size / config.train.micro_batch_size  # cosine and sine, for queries and keys
    if not mixture:
        return result + tokens * model.ffn_hidden_size * size * (2 + _keeps_input(config, "down")) / config.parallel.tensor
    assert moe is not None  # where a layer is a mixture
    result += tokens * moe.shared_ffn_hidden_size * size * (2 + _keeps_input(config, "shared.down")) / config.parallel.tensor
    routed = tokens * moe.top_k / config.parallel.tensor  # a copy keeps the experts' input as well
    ffn = moe.expert_width(model) * size * ((2 if fused else 4) + _keeps_input(config, "experts.down"))
    inputs = model.hidden_size * size * config.parallel.expert_tensor * _keeps_input(config, "experts.gate", "experts.up")
    return result + routed * (inputs + ffn)


def _keeps_input(config: RunConfig, *kinds: str) -> bool:
    """Whether what these matrices multiply is kept, for the gradient of one of them, or of an A beside it."""
    return config.adapter is None or any(kind in config.adapter.matrices for kind in kinds)


def _kept_by_adapters(config: RunConfig, tokens: float, mixture: bool) -> Iterator[float]:
    """Values that the adapters of a layer keep of a micro-batch: A x, and A and B as they were put together."""
    moe, parallel = config.moe, config.parallel
    assert config.adapter is not None
    ffn = [f"{of}{name}" for of in (("experts.", "shared.") if mixture else ("",)) for name in FFN]
    for kind in (*ATTENTION, *ffn):
        if kind in config.adapter.matrices:
            copies, its_tokens = 1.0, tokens
            if kind.startswith("experts."):
                assert moe is not None
                copies = moe.num_experts / parallel.expert if config.adapter.experts == "each" else 1.0
                its_tokens = tokens * moe.top_k * parallel.expert_tensor / parallel.tensor
            elif kind.rpartition(".")[2] in ("attention_out", "down"):
                its_tokens = tokens / parallel.tensor
            yield its_tokens * config.adapter.rank_of(kind) + copies * _adapters(config, [kind])


def _norm(config: RunConfig, tokens: float, size: int, fused: bool, is_output_kept: bool) -> float:
    """What RMSNorm keeps (of a frozen one no normalised input), and its output, where the matrix product behind it keeps that."""
    own = size if fused else 4 if config.adapter else 8
    return tokens * config.model.hidden_size / config.parallel.tensor * (own + size * is_output_kept)


def _largest_gradients(config: RunConfig, tokens: float, size: int) -> float:
    """Of the inputs of SwiGLU and of its matrix, while both are there; the matrices of a rank's experts have one gradient. A frozen matrix
    has none, and its adapter a copy of those of the inputs."""
    model, moe, parallel = config.model, config.moe, config.parallel
    hidden, tensor = (0 if config.adapter else model.hidden_size), parallel.tensor
    largest = 0.0
    if flops.num_mixtures(model, moe) < model.num_layers:
        largest = (tokens + hidden) / tensor * model.ffn_hidden_size
    if moe is not None:
        rows = tokens * moe.top_k / tensor + moe.num_experts / parallel.expert * hidden / parallel.expert_tensor
        largest = max(largest, rows * moe.expert_width(model), (tokens + hidden) / tensor * moe.shared_ffn_hidden_size)
    return largest * 2 * size * (2 if config.adapter else 1)
