from itertools import chain

import numpy as np
import pytest
import torch

from fdl.datamodules import text as module
from fdl.datamodules.text import TOKEN_PADDING, TextSamples, encoded
from fdl.modules.tokenizers import make_tokenizer

TEXTS = [[7, 8, 9], [1], [4, 5], [6, 6, 6, 6]]


def samples(texts=TEXTS, dtype=np.uint16, **columns):
    return TextSamples(np.fromiter(chain(*texts), dtype=dtype), [len(t) for t in texts], **columns)


def rows(texts):
    """Each row of all texts, without padding."""
    tokens, _ = texts.batch(torch.arange(len(texts)))
    return [[token for token in row if token != TOKEN_PADDING] for row in tokens.tolist()]


def test_batches_are_padded_to_their_longest_text():
    tokens, labels = samples(labels=torch.tensor([0, 1, 2, 3])).batch(torch.tensor([2, 0, 2]))
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[4, 5, -1], [7, 8, 9], [4, 5, -1]]
    assert labels.tolist() == [2, 0, 2]
    assert samples().batch(torch.tensor([1, 1]))[0].tolist() == [[1], [1]]


def test_with_a_width_batches_are_as_wide():
    tokens, labels = samples(width=5).batch(torch.tensor([1, 3]))
    assert tokens.tolist() == [[1, -1, -1, -1, -1], [6, 6, 6, 6, -1]]
    assert labels is None
    assert samples(width=5).input_shape == (5,)
    assert samples().input_shape == (4,)


def test_a_batch_is_the_callers_to_change():
    texts = samples()
    texts.batch(torch.tensor([3]))[0].fill_(0)
    assert rows(texts) == TEXTS


@pytest.mark.parametrize("copy_below", [0, 1 << 30], ids=["view", "copy"])
def test_subsets_of_subsets(copy_below, monkeypatch):
    monkeypatch.setattr(module, "COPY_BELOW", copy_below)
    whole = samples(labels=torch.arange(4), groups=np.array(["a", "b", "c", "d"]))
    inner = whole.subset([3, 1, 0]).subset(torch.tensor([2, 0, 2]))
    assert rows(inner) == [TEXTS[0], TEXTS[3], TEXTS[0]]
    assert inner.labels.tolist() == [0, 3, 0]
    assert inner.groups.tolist() == ["a", "d", "a"]
    assert inner.lengths.tolist() == [3, 4, 3]
    assert inner.nbytes == 2 * 10
    assert np.shares_memory(inner._tokens, whole._tokens) == (copy_below == 0)
    assert len(whole.subset([])) == 0
    assert whole.subset([]).batch(torch.arange(0))[0].shape == (0, 0)


def test_unlabelled_has_neither_labels_nor_groups():
    public = samples(labels=torch.arange(4), groups=np.array(list("abcd"))).unlabelled()
    assert public.labels is None
    assert public.groups is None
    assert rows(public) == TEXTS


def test_truncated_texts_keep_their_beginning():
    short = samples().truncated(2)
    assert rows(short) == [[7, 8], [1], [4, 5], [6, 6]]
    assert rows(short.subset([3, 0])) == [[6, 6], [7, 8]]
    assert short.nbytes == 2 * 7


def test_content_hash_is_of_what_a_model_sees():
    same = [samples(), samples(labels=torch.arange(4)), samples(dtype=np.uint32), samples().unlabelled()]
    assert len({s.content_hash() for s in same}) == 1
    moved = [[7, 8], [9, 1], [4, 5], [6, 6, 6, 6]]  # the same ids in order, cut elsewhere
    others = [samples(moved), samples(width=9), samples().subset([1, 0, 2, 3]), samples().truncated(3)]
    assert len({samples().content_hash(), *(o.content_hash() for o in others)}) == 5
    assert samples().subset([2, 0]).content_hash() == samples([TEXTS[2], TEXTS[0]]).content_hash()


def test_mismatched_arguments():
    with pytest.raises(ValueError, match="10 tokens for texts of 9 tokens"):
        TextSamples(np.zeros(10, np.uint16), [4, 5])
    with pytest.raises(ValueError, match="a text of 4 tokens is wider than 3"):
        samples(width=3)
    with pytest.raises(ValueError, match="4 texts with 3 labels"):
        samples(labels=torch.arange(3))
    with pytest.raises(IndexError, match=r"0 … 3"):
        samples().subset([4])


# -- windows -----------------------------------------------------------------------------------------------------


def test_packing_by_hand():
    groups = np.array(["x", "y", "x", "y"])
    windows = samples(groups=groups).packed(3, separator=0)
    # x: 7 8 9 0 4 5 0, whose seventh token alone predicts nothing; y: 1 0 6 6 6 6 0, likewise
    assert rows(windows) == [[7, 8, 9], [0, 4, 5], [1, 0, 6], [6, 6, 6]]
    assert windows.groups.tolist() == ["x", "x", "y", "y"]
    windows = samples(groups=groups).packed(4, separator=0)
    assert windows.batch(torch.arange(4))[0].tolist() == [[7, 8, 9, 0], [4, 5, 0, -1], [1, 0, 6, 6], [6, 6, 0, -1]]
    assert rows(samples().packed(4, separator=None)) == [[7, 8, 9, 1], [4, 5, 6, 6], [6, 6]]
    assert samples().packed(4, separator=0).groups is None


def test_packing_nothing():
    empty = samples(groups=np.array(list("abcd"))).subset([])
    assert len(empty.packed(4, 0)) == 0
    assert empty.packed(4, 0).batch(torch.arange(0))[0].shape == (0, 4)


@pytest.mark.parametrize("width", [2, 3, 17, 64, 1000])
def test_windows_hold_every_group_s_text_in_order(width):
    """Against a plain loop over documents: join those of a group, cut, drop a lone last token."""
    rng = np.random.default_rng(width)
    texts = [rng.integers(1, 300, rng.integers(1, 40)).tolist() for _ in range(200)]
    groups = rng.choice(["a", "b", "c", "d"], 200)
    windows = samples(texts, groups=groups).packed(width, separator=0)
    expected, owners = [], []
    for group in "abcd":
        joined = [token for text, own in zip(texts, groups) if own == group for token in [*text, 0]]
        cuts = [joined[start : start + width] for start in range(0, len(joined), width)]
        cuts = [cut for cut in cuts if len(cut) > 1]
        expected += cuts
        owners += [group] * len(cuts)
    assert rows(windows) == expected
    assert windows.groups.tolist() == owners
    assert windows.batch(torch.arange(len(windows)))[0].shape == (len(expected), width)


def test_windows_decode_to_the_text():
    tokenizer = make_tokenizer("bytes")
    texts = ["Füße, naïve – 日本語\n", "second line\r\n  indented", "x" * 50]
    windows = encoded(tokenizer, texts).packed(16, tokenizer.eos)
    joined = [token for row in rows(windows) for token in row]
    ends = [i for i, token in enumerate(joined) if token == tokenizer.eos]
    parts = np.split(joined, [end + 1 for end in ends])
    assert [tokenizer.decode([t for t in part if t != tokenizer.eos]) for part in parts if len(part)] == texts


def test_large_vocabularies_need_four_bytes():
    class Wide:
        vocab_size, eos = 100_000, 99_999

        def encode(self, text):
            return [ord(character) + 70_000 for character in text]

    wide = encoded(Wide(), ["ab", "c"])
    assert rows(wide) == [[70_097, 70_098], [70_099]]
    assert wide.nbytes == 12
    assert rows(wide.packed(8, Wide.eos)) == [[70_097, 70_098, 99_999, 70_099, 99_999]]
    Wide.vocab_size = 1 << 16
    Wide.encode = lambda self, text: [65_535] * len(text)
    assert encoded(Wide(), ["ab"]).nbytes == 4
    assert rows(encoded(Wide(), ["ab"])) == [[65_535, 65_535]]


def test_many_texts_are_tokenised_part_by_part(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 2)
    tokenizer = make_tokenizer("bytes")
    texts = encoded(tokenizer, ["ab", "c", "", "def", "g"], labels=torch.arange(5))
    assert rows(texts) == [[97, 98], [99], [], [100, 101, 102], [103]]
    assert len(encoded(tokenizer, [])) == 0
    assert texts.content_hash() == encoded(tokenizer, ["ab", "c", "", "def", "g"]).content_hash()
