import numpy as np
import pytest
import torch

from trainer.batch import IGNORE_INDEX, Batch, Run


def test_labels_are_the_next_token_of_the_same_document():
    rows = [[Run(np.array([5, 6, 7])), Run(np.array([8, 9]), successor=4)], [Run(np.array([3]))]]
    batch = Batch.from_rows(rows, seq_len=6, pad_id=1, source="here")
    ignore = IGNORE_INDEX
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 1], [3, 1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[6, 7, ignore, 9, 4, ignore], [ignore] * 6]
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.valid_labels == 4
    assert batch.source == "here"


def test_info_tiles_rows_with_documents_and_one_run_of_padding():
    rows = [[Run(np.arange(3)), Run(np.arange(2))], [Run(np.arange(7))], []]
    info = Batch.from_rows(rows, seq_len=7, pad_id=0).info
    assert info.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1], list(range(7)), list(range(7))]
    assert info.index.tolist() == [list(range(7))] * 3
    assert info.valid.sum(dim=1).tolist() == [5, 7, 0]
    tiles = [[(f.length, f.padding) for f in row] for row in info.fragments]
    assert tiles == [[(3, False), (2, False), (2, True)], [(7, False)], [(7, True)]]


@pytest.mark.parametrize("lengths", [(4, 4), (3, 0)])
def test_runs_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match="row 0"):
        Batch.from_rows([[Run(np.arange(n)) for n in lengths]], seq_len=7, pad_id=0)


def test_moves_every_tensor():
    batch = Batch.from_rows([[Run(np.arange(3))]], seq_len=4, pad_id=0).to("meta")
    tensors = (batch.tokens, batch.labels, batch.info.index, batch.info.positions, batch.info.valid)
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert batch.valid_labels == 2
