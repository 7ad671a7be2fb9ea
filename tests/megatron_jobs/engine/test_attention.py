"""Attention that stays within documents, whole and over context- and tensor-parallel ranks."""

import numpy as np
import pytest

from megatron_jobs.config import RunConfig
from tests.conftest import MOE, tiny
from tests.ranks import run_ranks

LENGTHS = [(10, 6, 16), (1, 20, 11)]  # of the documents in the two rows of a batch
DOCUMENTS = np.stack([np.repeat(np.arange(3), row) for row in LENGTHS])
TOKENS = np.random.default_rng(1).integers(0, 300, DOCUMENTS.shape)
LAYOUTS = [(1, {}), (2, dict(context=2)), (2, dict(tensor=2)), (4, dict(context=2, tensor=2))]


@pytest.mark.parametrize("world, sizes", LAYOUTS, ids=str)
def test_no_document_sees_another(prepared, tmp_path, world, sizes):
    """Other tokens in the middle document leave every bit of the outputs for the rest as it was; not so without the separation."""
    middle = DOCUMENTS == 1
    other = np.where(middle, (TOKENS + 7) % 300, TOKENS)
    batches = [(TOKENS, DOCUMENTS), (other, DOCUMENTS), (TOKENS, None), (other, None)]
    before, after, open_before, open_after = run_ranks(world, logits, tiny(prepared, tmp_path, parallel=sizes), batches)[0]
    assert (before[~middle] == after[~middle]).all() and (before[middle] != after[middle]).all(axis=-1).mean() > 0.9
    assert (open_before[DOCUMENTS == 0] == open_after[DOCUMENTS == 0]).all()
    assert (open_before[DOCUMENTS == 2] != open_after[DOCUMENTS == 2]).mean() > 0.9


@pytest.mark.parametrize("world, sizes", LAYOUTS, ids=str)
def test_a_document_gets_what_it_gets_alone(prepared, tmp_path, world, sizes):
    """Wherever it starts in the sequence: so rotary positions need no start of their own."""
    together = run_ranks(world, logits, tiny(prepared, tmp_path, parallel=sizes, moe=MOE), [(TOKENS, DOCUMENTS)])[0][0]
    apart = [(TOKENS[row, DOCUMENTS[row] == document][None], None) for row in range(2) for document in range(3)]
    alone = run_ranks(1, logits, tiny(prepared, tmp_path, moe=MOE), apart)[0]
    assert np.concatenate(alone, axis=1)[0] == pytest.approx(together.reshape(-1, together.shape[-1]), abs=1e-5)


def logits(config: RunConfig, batches: list[tuple[np.ndarray, np.ndarray | None]]) -> list[np.ndarray]:
    """Of each batch of (tokens, documents), put together from all ranks: [B, W, V]."""
    import torch
    from megatron.core import parallel_state

    from megatron_jobs import ranks
    from megatron_jobs.checkpoints.weights import InitialWeights
    from megatron_jobs.engine import attention, groups, placement
    from megatron_jobs.engine.gpt import build, forward

    with groups.of_run(config.parallel, config.seed), torch.no_grad():
        gpt = build(config.model, config.moe, config.parallel, torch.float32, 64)
        placement.fill(placement.local_parameters(gpt, config.model, config.moe), InitialWeights(config.model, config.moe, config.seed))
        result = []
        for tokens, documents in batches:
            part = forward(gpt, torch.tensor(tokens), documents_BW=None if documents is None else torch.tensor(documents))
            where = attention.this_part(torch.arange(tokens.shape[1])[None])[0]
            whole = np.zeros((*tokens.shape, config.model.padded_vocab_size), np.float32)
            for rank, positions, values in ranks.gathered((parallel_state.get_tensor_model_parallel_rank(), where, part)):
                whole[:, positions, rank * values.shape[-1] : (rank + 1) * values.shape[-1]] = values
            result.append(whole[..., : config.model.vocab_size])
        return result


def test_documents_packed_for_transformer_engine():
    assert run_ranks(1, packed_numbers)[0] == ([0, 2, 5, 6, 9, 12], 3)


def packed_numbers() -> tuple[list[int], int]:
    import torch

    from megatron_jobs.engine import attention

    packed = attention.packed(torch.tensor([[0, 0, 1, 1, 1, 2], [2, 2, 2, 3, 3, 3]]))
    assert packed.qkv_format == "thd" and packed.cu_seqlens_q.dtype == torch.int32 and packed.cu_seqlens_kv.equal(packed.cu_seqlens_q)
    assert packed.max_seqlen_q == packed.max_seqlen_kv
    return packed.cu_seqlens_q.tolist(), packed.max_seqlen_q
