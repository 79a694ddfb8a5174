import numpy as np

from calledshot.objective import PADDING, causal

BEGIN, END, PAD = 100, 101, 102


def test_a_row_of_two_pieces_and_padding():
    batch = causal([[np.array([BEGIN, 1, 2, END]), np.array([BEGIN, 7, END])], []], [3, 0], 6, PAD)
    assert batch.inputs.tolist() == [[BEGIN, 1, 2, BEGIN, 7, PAD], [PAD] * 6]
    assert batch.targets.tolist() == [[1, 2, END, 7, END, PAD], [PAD] * 6]
    assert batch.loss_weights.tolist() == [[1, 1, 1, 1, 1, 0], [0] * 6]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, PADDING], [PADDING] * 6]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0] * 6]
    assert batch.sources.tolist() == [3, 0]
    assert batch.tokens == 5
    dtypes = {name: array.dtype for name, array in vars(batch).items() if array is not None}
    assert dtypes == {
        **dict.fromkeys(("inputs", "targets", "documents", "positions", "sources"), np.int32),
        "loss_weights": np.float32,
        "regions": np.int8,
    }


def test_begin_is_never_a_target_and_end_never_an_input():
    documents = [np.array([BEGIN, *range(n), END], np.uint16) for n in (1, 2, 3)]
    batch = causal([documents], [0], 12, PAD)
    real = batch.loss_weights > 0
    assert BEGIN not in batch.targets[real] and END not in batch.inputs[real]
    assert (batch.targets[real] == END).sum() == 3
