"""An index of texts that finds exact and near copies of other texts.

A text is compared word by word. In scripts without spaces each letter is a word, and two count as one. The index holds
hashes of n-grams of words; texts that share one are compared by edit distance. All of it is in arrays.
"""

import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import NamedTuple
from zlib import crc32

import numpy as np
from rapidfuzz.distance import OSA, Levenshtein

from gritlm.data.rows import text_id

NEAR, SIMILAR = 12, 6  # one word in this many may differ
MIN_WORDS, MIN_LETTERS = 12, 40  # a text with as many words or letters may differ in a word and be a near copy
PROMPT_WORDS = 40  # a prompt in front is not longer
# Length of the n-grams: words of the indexed texts that have them, words of the texts that are looked up by them.
GRAMS = {3: ((6, 11), (5, 60)), 4: ((12, 79), (10, 140)), 8: ((80, 1 << 30), (66, 1 << 30))}
MAX_TEXTS = 300  # an n-gram of more texts than this says too little
COMPARED = 1280  # words of the texts that are compared with one: those with most n-grams in common
LONG, WINDOW = 1000, 160  # letters: a longer text is first looked up by two windows
BATCH = 4096  # texts that are hashed together
MIX = np.uint32(0x9E3779B1)
HALF, LOW_HALF = np.uint64(32), np.uint64(0xFFFFFFFF)
# Prompts of well-known models. What else stands in front of a colon or line break is one if the text equals the rest.
PROMPT = re.compile(
    r"\s*(?:(?:<\|user\|>\s*)?<?instruct(?:ion)?>?\s*:.{,1000}?<?query>?\s*:|(?:<\|user\|>.{,1000}?)?<\|embed\|>"
    r"|task\s*:[^|\n]*\|\s*query\s*:|represent (?:this|the)\b[^:\n]*:|(?:title\s*:[^|\n]*\|\s*)?text\s*:"
    r"|(?:search_)?(?:query|question|q|passage|document|clustering|classification)\s*:"
    r"|为这个句子生成表示以用于检索相关文章\s*[:：])\s*(?=\S)",
    re.IGNORECASE | re.DOTALL,
)
END_OF_PROMPT = re.compile(r"[:：\n|>\]]\s*(?=\S)")
_NO_SPACES = "\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\U00020000-\U0003ffff"
UNSPACED = re.compile(f"[{_NO_SPACES}]")  # Thai to Burmese, Khmer, kana, Han


class Match(NamedTuple):
    """How a text equals an indexed text, and the number of that text.

    "exact": equal up to trailing white space. "near": equal up to case, punctuation, spacing or a prompt in front; or
    a longer text in which at most one word in 12 differs. "similar": at most one word in 6 differs. "": no match.
    """

    kind: str = ""
    number: int = -1


class _Letters(dict):
    """For `str.translate`: keeps letters, digits, combining marks and the signs of mathematics and currencies.

    Punctuation is left out, so that a word stays one. A dash or another sign becomes a space.
    """

    def __missing__(self, code: int) -> str | None:
        letter = chr(code)
        kind = unicodedata.category(letter)
        if letter.isalnum() or kind in ("Mn", "Mc", "Me", "Sm", "Sc") or letter == "#":
            self[code] = f" {letter} " if UNSPACED.match(letter) else letter
        else:
            self[code] = None if kind == "Cf" or (kind[0] == "P" and letter not in "\u2014\u2026") else " "
        return self[code]


_LETTERS = _Letters()
_HASH_SIGN = re.compile(r"#(?<!\w#)")  # not that of C#


def _words(text: str) -> str:
    """The words of a text in lower case and NFKC form, without punctuation, a space between them."""
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    text = _HASH_SIGN.sub(" ", text) if "#" in text else text
    return " ".join(text.casefold().translate(_LETTERS).split())


def normal_text(text: str) -> str:
    """A text without case, punctuation and spacing. Texts with equal normal texts are near copies."""
    return _words(text).replace(" ", "") or text.strip()


def _without_prompt(text: str) -> str:
    return text[found.end() :] if (found := PROMPT.match(text)) else text


def _after_colons(text: str) -> list[str]:
    """What follows each colon or line break, if it is long enough to be a query and short enough not to be compared."""
    if len(text) > 8 * (MIN_LETTERS + WINDOW):
        return []
    start = max(0, len(text) - WINDOW)
    rests = [text[found.end() :] for found in END_OF_PROMPT.finditer(text, start)]
    return [rest for rest in rests if _size(_words(rest)) >= 3]


def _size(words: str) -> float:
    return words.count(" ") + 1 - (0 if words.isascii() else len(UNSPACED.findall(words)) / 2)


def _is_longer(words: str) -> bool:
    unspaced = 0 if words.isascii() else len(UNSPACED.findall(words))
    return words.count(" ") + 1 - unspaced / 2 >= MIN_WORDS or len(words) - unspaced >= MIN_LETTERS


def _is_misspelt(a: str, b: str) -> bool:
    return len(a) > 3 < len(b) and a[0] == b[0] and (a + b).isalpha() and OSA.distance(a, b, score_cutoff=1) <= 1


def _compare(a: str, b: str) -> str:
    """Compare the words of two texts: "near", "similar" or ""."""
    a, b = (a, b) if len(a) > len(b) else (b, a)
    longer, shorter = a.split(), b.split()
    share = _share_changed(longer, shorter)
    extra = len(longer) - len(shorter)
    if share * NEAR > 1 and 0 < extra <= PROMPT_WORDS and _is_longer(b):
        share = min(share, _share_changed(longer[extra:], shorter))
    if share * NEAR <= 1 and _is_longer(a):
        return "near"
    return "similar" if share * SIMILAR <= 1 and _size(a) >= SIMILAR else ""


def _share_changed(longer: list[str], shorter: list[str]) -> float:
    """The share of words that are changed, added or lost; a misspelt word counts half. 1 if it is above one in 6."""
    most = len(longer) // SIMILAR
    changed: float = Levenshtein.distance(longer, shorter, score_cutoff=2 * most)
    if changed > 2 * most:
        return 1
    if changed * NEAR > len(longer) and len(longer) < LONG:
        edits = [edit for edit in Levenshtein.editops(longer, shorter) if edit.tag == "replace"]
        changed -= sum(_is_misspelt(longer[edit.src_pos], shorter[edit.dest_pos]) for edit in edits) / 2
    return changed / len(longer)


def is_near_copy(a: str, b: str) -> bool:
    """Whether one text is an exact or near copy of the other."""
    return _equal(a, b) or _equal(b, a) or _compare(_words(a), _words(b)) == "near"


def _equal(a: str, b: str) -> bool:
    wanted = normal_text(_without_prompt(a))
    return any(normal_text(text) == wanted for text in (_without_prompt(b), *_after_colons(b)))


class _Numbers:
    """The numbers of texts by a hash of 64 bits, in two arrays."""

    def __init__(self, hashes: array):
        order = np.argsort(_array(hashes), kind="stable")
        self.hashes, self.numbers = _array(hashes)[order], order.astype(np.int32)

    def first(self, key: int) -> int:
        """The number of the first text with a hash; -1 if there is none."""
        place = int(np.searchsorted(self.hashes, key))
        return int(self.numbers[place]) if place < len(self.hashes) and self.hashes[place] == key else -1


def _hash_grams(texts: Sequence[str], sizes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The n-grams of texts, by which they are indexed or, with `sizes`, looked up.

    Args:
        texts: their words.
        sizes: how many words each text is thought to have.
    Returns:
        hash of each n-gram, number of its text, and how many of the rarest n-grams of this text are to be indexed.
    """
    words = [text.encode().split() for text in texts]
    counts = np.fromiter(map(len, words), np.int32, len(words))
    rolled = hashes = np.fromiter(map(crc32, chain.from_iterable(words)), np.uint32, counts.sum())
    owners = np.repeat(np.arange(len(words), dtype=np.int32), counts)
    wanted = (counts if sizes is None else sizes)[owners]
    found = [(hashes[:0], owners[:0], owners[:0])]
    for length in range(2, min(max(GRAMS), len(hashes)) + 1):
        rolled = rolled[:-1] * MIX + hashes[length - 1 :]
        if length in GRAMS:
            low, high = GRAMS[length][sizes is not None]
            of, size = owners[: len(rolled)], wanted[: len(rolled)]
            chosen = (of == owners[length - 1 :]) & (low <= size) & (size <= high)
            quota = np.minimum(1 + length * (size // SIMILAR), size * 3 // 4)
            found.append((rolled[chosen], of[chosen], quota[chosen]))
    hashes, owners, quotas = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return hashes, owners, quotas


class NearCopies:
    """An index of texts, in arrays. It is the same in every process."""

    def __init__(self, texts: Iterable[str]):
        exact, keys, ends = array("q"), array("q"), array("q", [0])
        self._words = bytearray()  # of all texts, one after the other
        counts = np.zeros(1 << 22, np.uint32)  # how often n-grams occur, by the first bits of their hash
        parts, texts = [], iter(texts)
        while batch := list(islice(texts, BATCH)):
            bare = [*map(_without_prompt, batch)]
            normal, words = [*map(normal_text, bare)], [*map(_words, bare)]
            exact.extend(map(text_id, batch))
            keys.extend(map(text_id, normal))
            whole = np.fromiter((crc32(text.encode()) for text in normal), np.uint32, len(normal))
            hashes, owners, quotas = _hash_grams(words)
            np.add.at(counts, hashes >> 10, 1)
            parts.append((np.uint64(len(ends) - 1), whole, hashes, owners, quotas))
            for text in words:
                self._words += text.encode()
                ends.append(len(self._words))
        self._exact, self._keys, self._ends = _Numbers(exact), _Numbers(keys), _array(ends)
        for place, (start, whole, hashes, owners, quotas) in enumerate(parts):
            hashes, owners = _rarest(hashes, owners, quotas, counts[hashes >> 10])
            hashes = np.concatenate([whole, hashes]).astype(np.uint64)
            parts[place] = hashes << HALF | np.concatenate([np.arange(len(whole)), owners]).astype(np.uint64) + start
        self._grams = np.concatenate([*parts, np.array([], np.uint64)])  # hash and number of a text, 32 bits each
        del parts
        self._grams.sort()
        self._shift = np.uint32(32 - min(32, max(16, len(self._grams).bit_length() + 4)))  # 16 to 32 bits for each
        self._bits = np.zeros(1 << (29 - int(self._shift)), np.uint8)
        for start in range(0, len(self._grams), 1 << 20):
            places = (self._grams[start : start + (1 << 20)] >> HALF).astype(np.uint32) * MIX >> self._shift
            np.bitwise_or.at(self._bits, places >> 3, (1 << (places & 7)).astype(np.uint8))

    def _spans(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = hashes.astype(np.uint64) << HALF
        return np.searchsorted(self._grams, first), np.searchsorted(self._grams, first | LOW_HALF, "right")

    def _known(self, hashes: np.ndarray) -> np.ndarray:
        """The places of the hashes that the index has. The bits rule most others out without a search."""
        bits = hashes * MIX >> self._shift
        places = np.flatnonzero(self._bits[bits >> 3] >> (bits & 7) & 1)
        starts, ends = self._spans(hashes[places])
        return places[starts < ends]

    def _owners(self, hashes: np.ndarray) -> np.ndarray:
        """The numbers of the texts that have one of these n-grams, as often as they have one."""
        spans = zip(*self._spans(hashes), strict=True)
        found = [self._grams[a:b] & LOW_HALF for a, b in spans if a < b <= a + MAX_TEXTS]
        return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)

    def find(self, text: str) -> Match:
        """The best match of a text among the indexed ones."""
        return self.find_all([text])[0]

    def find_all(self, texts: Sequence[str]) -> list[Match]:
        """The best match of each text. Many texts at once are looked up several times faster than one by one."""
        words, sizes, letters, owners = [], array("q"), array("I"), array("q")
        for number, text in enumerate(texts):
            if len(text) > LONG:
                middle, end = len(text) // 3, 2 * len(text) // 3
                words.append(_words(text[middle : middle + WINDOW] + " " + text[end : end + WINDOW]))
                if words[-1].count(" ") > 2 * max(GRAMS):
                    sizes.append(1 << 30)
                    continue
                words.pop()
            text = _without_prompt(text)
            words.append(_words(text))
            sizes.append(words[-1].count(" ") + 1)
            letters.append(crc32((words[-1].replace(" ", "") or text.strip()).encode()))
            owners.append(number)
            for rest in _after_colons(text):
                letters.append(crc32(normal_text(rest).encode()))
                owners.append(number)
        grams, of, _ = _hash_grams(words, _array(sizes))
        hashes, of = np.concatenate([grams, _array(letters)]), np.concatenate([of, _array(owners)])
        found = [Match()] * len(texts)
        for number in np.unique(of[self._known(hashes)]).tolist():
            found[number] = self._find(texts[number])
        return found

    def _find(self, text: str) -> Match:
        if (number := self._exact.first(text_id(text))) >= 0:
            return Match("exact", number)
        text = _without_prompt(text)
        for rest in (text, *_after_colons(text)):
            if (number := self._keys.first(text_id(normal_text(rest)))) >= 0:
                return Match("near", number)
        words = _words(text)
        size = words.count(" ") + 1
        grams, _, _ = _hash_grams([words], np.array([size]))
        numbers, shared = np.unique(self._owners(np.unique(grams)), return_counts=True)
        other_length = np.abs(self._ends[numbers + 1] - self._ends[numbers] - len(words.encode()))
        order = np.lexsort((other_length, -shared))[: max(8, COMPARED // size)]
        best = Match()
        for number in numbers[order].tolist():
            indexed = self._words[self._ends[number] : self._ends[number + 1]].decode()
            kind = _compare(words, indexed)
            if kind == "near":
                return Match(kind, number)
            best = best if best.kind or not kind else Match(kind, number)
        return best


def _array(values: array) -> np.ndarray:
    return np.array(values, dtype=values.typecode)


def _rarest(
    hashes: np.ndarray, owners: np.ndarray, quotas: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each text the rarest n-grams, as many as its quota: with one word in 6 changed, one of them is left."""
    order = np.lexsort((hashes, counts, owners))
    hashes, owners, quotas = hashes[order], owners[order], quotas[order]
    kept = np.arange(len(owners)) - np.searchsorted(owners, owners) < quotas
    return hashes[kept], owners[kept]
