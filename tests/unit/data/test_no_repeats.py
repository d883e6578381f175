"""No text twice in a batch: which rows repeat one, and how postponed rows come back."""

import numpy as np

from gritlm.data.no_repeats import PostponedRows, RowTexts


def row_texts(*rows: list[int]) -> RowTexts:
    return RowTexts(np.cumsum([0, *map(len, rows)]), np.array([text for row in rows for text in row]))


def test_a_row_that_shares_a_text_with_an_earlier_one_is_a_repeat():
    texts = row_texts([1, 2], [3], [2, 4], [3, 5], [6])
    assert texts.rows_without_repeats(np.arange(5)).tolist() == [True, True, False, False, True]
    assert texts.rows_without_repeats(np.array([3, 1])).tolist() == [True, False]


def test_the_texts_of_data_sets_can_be_concatenated():
    joined = RowTexts.concatenate([row_texts([1], [2, 3]), row_texts([4, 5])])
    assert joined.starts.tolist() == [0, 1, 3, 5] and joined.ids.tolist() == [1, 2, 3, 4, 5]
    assert joined.of([0, 2]) == [[1], [4, 5]]


def test_postponed_rows_come_back_without_sharing_a_text():
    texts = row_texts([1, 9], [1, 8], [2, 9], [3, 7], [2, 8])
    postponed = PostponedRows(texts)
    postponed.put_all(np.arange(5), batch=np.array([], dtype=np.int64))
    assert postponed.take(5).tolist() == [0, 3, 4], "row 1 shares text 1 with row 0, row 2 shares text 9"
    assert postponed.rest().tolist() == [2, 1], "row 1 came forward and was postponed again"
    assert postponed.take(1).tolist() == [2]
    assert postponed.take(5).tolist() == [1]
    assert postponed.take(5).tolist() == []
