"""Causal attention, within documents where a phase separates them, over the whole sequence or over a rank's part of it.

GPTModel hands its `attention_mask` argument down to here as it is; what it carries is `documents_BW`, the number of the
document that each position of the whole sequence belongs to, or None where every position sees all before it. Positions need
no change at a document's start: rotary embeddings act through differences of positions alone (GPTModel does not look at
position ids for them), and within a document these are the same wherever it starts.

Shapes: W whole sequence, S a context-parallel rank's part of it, B micro-batch, N attention heads, G query groups, H head
size; megatron-core puts the sequence first.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig


class FusedAttention(torch.nn.Module):
    """torch's scaled_dot_product_attention in the place of megatron-core's unfused attention.

    A context-parallel rank has the queries of its part of the sequence, and gathers the keys and values of all parts.
    """

    def __init__(self, config: TransformerConfig, *, pg_collection: Any, **_: Any) -> None:
        super().__init__()
        self.context_group = pg_collection.cp

    def forward(
        self, q_SBNH: torch.Tensor, k_SBGH: torch.Tensor, v_SBGH: torch.Tensor, documents_BW: torch.Tensor | None, **_: Any
    ) -> torch.Tensor:
        size, mask_BSW = self.context_group.size(), None
        if size == 1 and documents_BW is not None and not q_SBNH.is_cuda:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBNH, k_SBGH, v_SBGH))
            return _by_document(q, k, v, documents_BW).permute(2, 0, 1, 3).flatten(2)
        if size > 1 or documents_BW is not None:
            parts = [part_of_sequence(len(q_SBNH) * size, rank, size).to(q_SBNH.device) for rank in range(size)]
            mask_BSW = visible(parts[self.context_group.rank()], torch.cat(parts), documents_BW)
        # one exchange for both; its backward sums what all ranks' queries want of a key, and hands it to the rank that owns it
        kv_WBGH = gather_from_sequence_parallel_region(torch.cat([k_SBGH, v_SBGH], dim=-1), group=self.context_group)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBNH, *kv_WBGH.chunk(2, dim=-1)))
        if mask_BSW is None:
            out_BNSH = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:  # no fused kernel of a GPU takes grouped keys together with a mask
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            out_BNSH = F.scaled_dot_product_attention(q, k, v, mask_BSW[:, None])
        return out_BNSH.permute(2, 0, 1, 3).flatten(2)


def _by_document(q_BNSH: torch.Tensor, k_BGSH: torch.Tensor, v_BGSH: torch.Tensor, documents_BS: torch.Tensor) -> torch.Tensor:
    """Each document by itself, [B, N, S, H]: a mask over the whole sequence would only throw away what lies between them.

    Not on a GPU, which would wait for the bounds and start a kernel for every document.
    """
    rows = []
    for row, documents_S in enumerate(documents_BS):
        sizes = documents_S.unique_consecutive(return_counts=True)[1].tolist()
        each = zip(*(x[row : row + 1].split(sizes, dim=2) for x in (q_BNSH, k_BGSH, v_BGSH)), strict=True)
        rows.append(torch.cat([F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in each], dim=2))
    return torch.cat(rows)


def visible(queries_S: torch.Tensor, keys_W: torch.Tensor, documents_BW: torch.Tensor | None) -> torch.Tensor:
    """Which keys each query sees, shape [B or 1, S, W]: those at or before its position, in its document. Arguments are positions."""
    causal_1SW = (keys_W <= queries_S[:, None])[None]
    if documents_BW is None:
        return causal_1SW
    return causal_1SW & (documents_BW[:, queries_S, None] == documents_BW[:, None, keys_W])


def part_of_sequence(length: int, rank: int, size: int) -> torch.Tensor:
    """The positions that a context-parallel rank holds, shape [length / size]: chunks `rank` and `2 size − 1 − rank` of 2 size.

    An early chunk with a late one gives all ranks the same work under a causal mask. The order is that of megatron-core's
    `get_batch_on_this_cp_rank` and of its rotary embeddings.
    """
    if size == 1:
        return torch.arange(length)
    chunks = torch.arange(length).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def this_part(x_BW: torch.Tensor) -> torch.Tensor:
    """This rank's part of a value per position, shape [B, S]."""
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    return x_BW[:, part_of_sequence(x_BW.shape[1], rank, size)]


def packed(documents_BW: torch.Tensor) -> PackedSeqParams:
    """The documents as Transformer Engine wants them, for a micro-batch that is laid out as one row of B × W positions.

    A row's first position starts a document, whatever stands at the end of the row before it.
    """
    starts_BW = torch.ones_like(documents_BW, dtype=torch.bool)
    starts_BW[:, 1:] = documents_BW[:, 1:] != documents_BW[:, :-1]
    end = torch.tensor([documents_BW.numel()], device=documents_BW.device)
    bounds = torch.cat([starts_BW.flatten().nonzero().flatten(), end]).int()
    longest = int(bounds.diff().max())
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
