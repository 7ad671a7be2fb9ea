"""The gate at the end of upcycling and of conversion: logits of both sides on real text, and a bound that fails the command."""

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_jobs.config import ParallelConfig, RunConfig
from megatron_jobs.config.model import ModelConfig, MoEConfig
from megatron_jobs.conversion.families import FAMILIES
from megatron_jobs.conversion.hugging_face import HuggingFaceFolder
from megatron_jobs.data import feeder, phases
from megatron_jobs.data.order import DataOrder
from megatron_jobs.engine import core, groups, placement
from megatron_jobs.engine.gpt import build
from mujina.matrices import Box, TensorSource
from mujina.user_input import UserError
from tokenization.load import load as load_tokenizer
from tokenization.tokenizer import Tokenizer

BOUND = 1e-4  # on the relative difference of logits between megatron-core and transformers
NUM_SAMPLES = 8
TEXTS = (
    "The Japanese badger lives in burrows which it digs itself, often together with others of its kind. In folk tales it changes its "
    "shape and plays tricks on travellers: they find themselves in a bath of leaves, or pay for their supper with coins of gold that "
    "turn out to be acorns in the morning.",
    "むじなは、アナグマのことをいう。昔話では人を化かす動物とされ、夜道で旅人をからかったり、木の葉を小判に変えて買い物をしたりする。"
    "山のふもとに穴を掘り、たぬきと同じ穴に住むこともあるという。",
)


@dataclass(frozen=True)
class Agreement:
    """How far two sides are apart: differences of logits, relative to the largest logit; mean losses in nats a token.

    Without a bound the sides are not meant to agree, and only values that are not finite fail.
    """

    max_relative_error: float
    mean_relative_error: float
    loss_before: float
    loss_after: float
    bound: float | None

    @property
    def holds(self) -> bool:
        if self.bound is None:
            return all(map(math.isfinite, (self.max_relative_error, self.loss_before, self.loss_after)))
        return self.max_relative_error <= self.bound  # False for NaN as well

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        bound = "no bound: they are not meant to agree" if self.bound is None else f"the bound is {self.bound:.0e}"
        return (
            f"logits agree to {self.max_relative_error:.2e} at most and {self.mean_relative_error:.2e} on average "
            f"(relative; {bound}); loss {self.loss_before:.6f} before, {self.loss_after:.6f} after"
        )


def samples(config: RunConfig) -> torch.Tensor:
    """The first samples that a run trains on: token ids, shape [samples, sequence length + 1]. Raises UserError without its data.

    The checkpoint of an imported model has no data: TEXTS stand in.
    """
    if not config.phases:
        return texts(load_tokenizer(config.tokenizer, config.end_of_document, config.begin_documents))
    binaries = feeder.open_sources(config)
    sources = feeder.facts(binaries)
    config = phases.resolve(config, sources)
    first = config.phases[0]
    order = DataOrder(config, sources)
    where = order.samples(0, range(min(NUM_SAMPLES, first.batch_size(0))))
    return torch.from_numpy(feeder.micro_batch(order, binaries, where, first).tokens)


def texts(tokenizer: Tokenizer) -> torch.Tensor:
    """TEXTS as token ids, shape [texts, length + 1]."""
    ids = [tokenizer.encode(text) for text in TEXTS]
    return torch.tensor([row[: min(map(len, ids))] for row in ids])


def megatron_logits(model_config: ModelConfig, moe: MoEConfig | None, weights: TensorSource, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of megatron-core's model in float32, shape [samples, sequence length, vocabulary]; within `groups.alone()`.

    No more than one layer, the embedding and the output layer are in memory at a time.
    """
    of_one_layer = model_config.model_copy(update={"num_layers": 1})
    kinds = [moe if moe and moe.is_mixture(number) else None for number in range(model_config.num_layers)]
    gpts = {kind: build(of_one_layer, kind, ParallelConfig(), torch.float32, tokens.shape[1]).eval() for kind in set(kinds)}
    parameters = {kind: placement.local_parameters(gpt, of_one_layer, kind) for kind, gpt in gpts.items()}
    gpt = gpts[kinds[0]]
    with torch.no_grad():
        placement.fill((local for local in parameters[kinds[0]] if not _is_of_layer(local)), weights)
        tokens = tokens.to(next(gpt.parameters()).device)
        hidden_SBH, rotary = core.embed(gpt, tokens)
        for number, kind in enumerate(kinds):
            placement.fill(filter(_is_of_layer, parameters[kind]), _Layer(weights, number))
            hidden_SBH = core.layer_forward(gpts[kind], 0, hidden_SBH, rotary)
        return core.unembed(gpt, hidden_SBH).transpose(0, 1)[..., : model_config.vocab_size].float().cpu()


def _is_of_layer(local: placement.LocalParameter) -> bool:
    return local.parts[0].name.startswith("layers.")


class _Layer:
    """One layer of a model as the first layer of another."""

    def __init__(self, weights: TensorSource, number: int) -> None:
        self.weights, self.number = weights, number

    def read(self, name: str, box: Box) -> torch.Tensor:
        return self.weights.read(name.replace("layers.0.", f"layers.{self.number}.", 1), box)


def transformers_logits(folder: Path, tensors: Mapping[str, Any], tokens: torch.Tensor, what: str) -> torch.Tensor:
    """Logits of transformers' model of a folder with these tensors: float32, shape [samples, sequence length, vocabulary].

    A tensor's values are `tensor[:]`. Each layer is in memory alone, as the only one of a model that `from_pretrained` makes. Raises
    UserError, which begins with `what`, when transformers finds tensors left over or missing.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    prefixes = [f"model.layers.{number}." for number in range(config.num_hidden_layers)]
    outside = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(prefixes))}
    with torch.no_grad():
        ends = _transformers_part(config, [], outside, what)
        hidden_BSH = ends.get_input_embeddings()(tokens)
        for number, prefix in enumerate(prefixes):
            of_layer = {name.replace(prefix, "model.layers.0."): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            layer = _transformers_part(config, [number], of_layer, f"{what}, layer {number}")
            hidden_BSH = layer.model(inputs_embeds=hidden_BSH, use_cache=False).last_hidden_state
        return ends.lm_head(ends.model.norm(hidden_BSH))


def _transformers_part(whole: Any, numbers: list[int], tensors: dict[str, Any], what: str) -> Any:
    """transformers' model of the layers `numbers` alone, without what stands outside of them; or, without any, of just that."""
    import transformers

    config = copy.deepcopy(whole)
    config.num_hidden_layers = len(numbers)
    if numbers:
        config.vocab_size, config.pad_token_id = 1, None
    if types := getattr(whole, "layer_types", None):
        config.layer_types = [types[number] for number in numbers]
    if hasattr(whole, "mlp_only_layers"):  # Qwen3-MoE; these say which layers are dense by their numbers
        dense = [n for n in numbers if n in whole.mlp_only_layers or (n + 1) % whole.decoder_sparse_step]
        config.mlp_only_layers, config.decoder_sparse_step = [0] * len(dense), 1
    transformers.utils.logging.disable_progress_bar()  # one a layer would be too many
    told = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # it warns of all that is not in this part; what is wrong is in `info`
    try:
        part, info = getattr(transformers, FAMILIES[config.model_type].architecture).from_pretrained(
            None,
            config=config,
            state_dict={name: tensor[:] for name, tensor in tensors.items()},
            dtype=torch.float32,
            output_loading_info=True,
        )
    finally:
        transformers.utils.logging.set_verbosity(told)
    if numbers:
        info["missing_keys"] = [name for name in info["missing_keys"] if ".layers." in name]
        part.model.norm = torch.nn.Identity()
    for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[trouble]:
            raise UserError(f"{what}: transformers reports {trouble}: {sorted(info[trouble])}: this is a defect, please report it")
    return part.eval()


def compare(before: torch.Tensor, after: torch.Tensor, labels: torch.Tensor, bound: float | None) -> Agreement:
    difference = (before - after).abs()
    scale = before.abs().max().clamp_min(torch.finfo(torch.float32).tiny)  # a new model's output layer may be zero
    losses = [float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())) for logits in (before, after)]
    return Agreement(float(difference.max() / scale), float(difference.mean() / scale), losses[0], losses[1], bound)


def compare_with_transformers(source: Any, folder: Path, tokens: torch.Tensor, what: str) -> Agreement:
    """Logits of `source` in megatron-core's model and of `folder` in transformers', on token ids [samples, length + 1].

    `source` has named matrices, a `model` and a `moe`; `what` names the command.
    Raises UserError when transformers finds keys left over or missing, or logits differ.
    """
    with groups.alone():
        ours = megatron_logits(source.model, source.moe, source, tokens[:, :-1])
    theirs = transformers_logits(folder, HuggingFaceFolder(folder).tensors, tokens[:, :-1], what)
    found = compare(ours, theirs, tokens[:, 1:], BOUND)
    print(found)
    require(found, what)
    return found


def require(agreement: Agreement, what: str) -> None:
    if not math.isfinite(agreement.loss_before):
        raise UserError(
            f"{what}: the model's own logits are not finite ({agreement}): nothing was written; take weights that are whole: "
            "`mujina checkpoint inspect` counts NaN and Inf in each layer"
        )
    if not agreement.holds:
        raise UserError(f"{what}: {agreement}: nothing was written; this is a defect, please report it with the configuration")
