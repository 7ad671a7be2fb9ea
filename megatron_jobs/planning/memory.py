"""Predicts the memory of a process in training, in bytes, from the shapes alone. Needs no torch.

Counted are the tensors of `state.py` and those that the layers of `gpt.py` keep for the backward pass. Two kinds of layers are known:
Transformer Engine's (on a GPU), and the local ones (on a CPU, and on a GPU without Transformer Engine), which keep more: RMSNorm its
input and the normalised input in float32, SwiGLU of experts every step.
tests/megatron_jobs/planning/test_memory.py holds the local ones against what a training step allocates.

Letters: T tokens of a micro-batch on a rank (split over `context`; `tensor` splits everything else, as it is sequence parallel too).
"""

from dataclasses import dataclass

from megatron_jobs.config import SOFTMAX_AT_ONCE, RunConfig
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
    dense, experts = parameters(config, stage)
    parallel = config.parallel
    copies = parallel.data(gpus) * parallel.context
    return dense / copies + experts * parallel.expert * parallel.expert_tensor / (copies * parallel.tensor)


def of_stage(config: RunConfig, gpus: int, stage: int, sequence_length: int, global_batch_size: int, fused: bool) -> Memory:
    """The memory of a rank of a pipeline stage; `fused`: with Transformer Engine's layers."""
    model, parallel, train = config.model, config.parallel, config.train
    size = 4 if train.precision == "fp32" else 2
    tokens = train.micro_batch_size * sequence_length / parallel.context
    num_parameters = sum(parameters(config, stage))
    micro_batches = global_batch_size // (train.micro_batch_size * parallel.data(gpus))

    layers, mixtures = model.num_layers // parallel.pipeline, mixtures_of(config, stage)
    sizes = [layer(config, tokens, fused, mixture) for mixture, count in ((False, layers - mixtures), (True, mixtures)) if count]
    per_layer = ((layers - mixtures) * sizes[0] + mixtures * sizes[-1]) / layers
    kept = tokens * model.hidden_size * size / parallel.tensor if train.recompute == "layers" else per_layer
    activations = layers / parallel.virtual_pipeline * kept * chunks_in_flight(config, micro_batches, stage)
    # the layer that is just computed again, or the gradients inside the layer that is just gone through
    buffers = max(sizes) if train.recompute == "layers" else _largest_gradients(config, tokens, size)
    vocabulary = size * model.padded_vocab_size * model.hidden_size / parallel.tensor  # the gradient of the embedding, or of the output
    if stage == parallel.pipeline - 1:
        logits = tokens * model.padded_vocab_size / parallel.tensor
        activations += size * logits + _norm(config, tokens, size, fused)
        # A part of the softmax, whose gradient takes the place of the logits; then the gradient of the matrix.
        buffers = max(buffers, 4 * min(logits, SOFTMAX_AT_ONCE["cuda" if fused else "cpu"]), vocabulary)
    message = tokens * model.hidden_size * size / parallel.tensor
    buffers += 2 * message * parallel.tensor * (parallel.tensor > 1)  # gathered input, and its gradient
    buffers += 4 * message * (parallel.pipeline > 1)  # received and sent, and their gradients
    if not fused and parallel.data(gpus) * parallel.context > 1:  # gloo copies the gradients to sum them, once the activations are gone
        buffers = max(buffers, 4 * max(parameters(config, stage)) + vocabulary * (stage == 0) - activations)
    weights = num_parameters * (4 if train.precision == "fp8" else size)  # fp8: Transformer Engine's copies, as they are and transposed
    return Memory(weights, 4 * num_parameters, owned(config, gpus, stage) * (8 if size == 4 else 12), activations, buffers)


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
    result = tokens * per_token + 2 * _norm(config, tokens, size, fused)
    if not fused:
        result += 4 * tokens * model.head_size * size / config.train.micro_batch_size  # cosine and sine, for queries and keys
    if not mixture:
        return result + tokens * model.ffn_hidden_size * size * 3 / config.parallel.tensor
    assert moe is not None  # where a layer is a mixture
    result += tokens * moe.shared_ffn_hidden_size * size * 3 / config.parallel.tensor
    routed = tokens * moe.top_k / config.parallel.tensor  # a copy keeps the experts' input as well
    ffn = moe.expert_width(model) * size * (3 if fused else 5)
    return result + routed * (model.hidden_size * size * config.parallel.expert_tensor + ffn)


def _norm(config: RunConfig, tokens: float, size: int, fused: bool) -> float:
    """What RMSNorm keeps, and its output, which the matrix product behind it keeps."""
    return tokens * config.model.hidden_size / config.parallel.tensor * (2 * size if fused else 8 + size)


def _largest_gradients(config: RunConfig, tokens: float, size: int) -> float:
    """Of the inputs of SwiGLU and of its matrix, while both are there; the matrices of a rank's experts have one gradient."""
    model, moe, parallel = config.model, config.moe, config.parallel
    hidden, tensor = model.hidden_size, parallel.tensor
    largest = 0.0
    if flops.num_mixtures(model, moe) < model.num_layers:
        largest = (tokens + hidden) / tensor * model.ffn_hidden_size
    if moe is not None:
        rows = tokens * moe.top_k / tensor + moe.num_experts / parallel.expert * hidden / parallel.expert_tensor
        largest = max(largest, rows * moe.expert_width(model), (tokens + hidden) / tensor * moe.shared_ffn_hidden_size)
    return largest * 2 * size
