"""An index of texts that finds exact and near copies of other texts.

A text is compared word by word. In scripts without spaces each letter is a word, and two count as one. The index holds
hashes of n-grams of words; texts that share one are compared by edit distance. All of it is in arrays.
"""

import html
import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import islice
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from rapidfuzz.distance import OSA, Levenshtein

from gritlm.data.rows import text_id

NEAR, SIMILAR = 12, 6  # one word in this many may differ
MIN_WORDS, MIN_LETTERS = 12, 40  # a text with as many words or letters may differ in a word and be a near copy
PROMPT_WORDS = 40  # a prompt in front is not longer
# Length of the n-grams: words of the indexed texts that have them, words of the texts that are looked up by them.
GRAMS = {3: ((6, 11), (5, 60)), 4: ((12, 47), (10, 100)), 6: ((48, 1 << 30), (40, 1 << 30))}
MAX_TEXTS = 300  # an n-gram of more texts than this says too little
SHARE = 16  # a text has at least one n-gram in this many words in common with its copy
COMPARED = 1280  # words of the texts that are compared with one: those with most n-grams in common
LONG, WINDOW = 600, 120  # letters: a longer text is first looked up by two windows
BATCH = 4096  # texts that are hashed together
MIX = np.uint32(0x9E3779B1)
SPACE = np.uint8(ord(" "))
SHORT = 12  # words: only a text of fewer is looked up as a whole by its letters
HALF, LOW_HALF = np.uint64(32), np.uint64(0xFFFFFFFF)
# Prompts of well-known models. What else stands in front of a colon or line break is one if the text equals the rest.
PROMPT = re.compile(
    r"\s*(?:(?:<\|user\|>\s*)?<?instruct(?:ion)?>?\s*:.{,1000}?<?query>?\s*:|(?:<\|user\|>.{,1000}?)?<\|embed\|>"
    r"|task\s*:[^|\n]*\|\s*query\s*:|represent (?:this|the)\b[^:\n]*:|(?:title\s*:[^|\n]*\|\s*)?text\s*:"
    r"|(?:search_)?(?:query|question|q|passage|document|clustering|classification)\s*:"
    r"|为这个句子生成表示以用于检索相关文章\s*[:：])\s*(?=\S)",
    re.IGNORECASE | re.DOTALL,
)
SEPARATORS, MOST_SEPARATORS = ":：\n", 3
END_OF_PROMPT = re.compile(rf"[{SEPARATORS}]\s*(?=\S)")
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
# Of HTML alone: <int> and <T> of a program and <query> of a prompt are words.
_TAG = re.compile(
    r"</?(?:[abipPu]|(?i:article|blockquote|body|br|center|code|div|em|font|h[1-6]|hr|html|img|li|ol|pre|section|small"
    r"|span|strong|sub|sup|table|tbody|td|th|thead|tr|ul))(?:\s[^<>]*)?/?>|<!--.*?-->",
    re.DOTALL,
)
_HASH_SIGN = re.compile(r"#(?<!\w#)")  # not that of C#


def _spaced(text: str) -> str:
    """A text in lower case and NFKC form without HTML and punctuation. Some words have several spaces between them."""
    if "&" in text:
        text = html.unescape(html.unescape(text))  # some corpora are escaped twice
    if "<" in text:
        text = _TAG.sub(" ", text)
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    text = _HASH_SIGN.sub(" ", text) if "#" in text else text
    return text.casefold().translate(_LETTERS)


def _words(text: str) -> str:
    return " ".join(_spaced(text).split())


def normal_text(text: str) -> str:
    """A text without HTML, case, punctuation and spacing. Texts with equal normal texts are near copies."""
    return _words(text).replace(" ", "") or text.strip()


def _variants(text: str) -> list[str]:
    """A text without a prompt of a well-known model; and of a short one what follows each colon or line break."""
    text = text[found.end() :] if (found := PROMPT.match(text)) else text
    if not 0 < sum(map(text.count, SEPARATORS)) <= MOST_SEPARATORS:
        return [text]
    rests = (text[found.end() :] for found in END_OF_PROMPT.finditer(text))
    return [text, *(rest for rest in rests if len(rest) <= WINDOW and _length(_words(rest))[0] >= 3)]


def _length(words: str) -> tuple[float, bool]:
    """How many words a text has, and whether it may differ in one and still be a near copy."""
    unspaced = 0 if words.isascii() else len(UNSPACED.findall(words))
    size = words.count(" ") + 1 - unspaced / 2
    return size, size >= MIN_WORDS or len(words) - unspaced >= MIN_LETTERS


def _is_misspelt(a: str, b: str) -> bool:
    return len(a) > 3 < len(b) and a[0] == b[0] and (a + b).isalpha() and OSA.distance(a, b, score_cutoff=1) <= 1


def _compare(a: str, b: str) -> str:
    """Compare the words of two texts: "near", "similar" or ""."""
    shorter, longer = sorted((a.split(), b.split()), key=len)
    share = _share_changed(longer, shorter)
    extra = len(longer) - len(shorter)
    if share * NEAR > 1 and 0 < extra <= PROMPT_WORDS and _length(" ".join(shorter))[1]:
        share = min(share, _share_changed(longer[extra:], shorter))
    size, is_long = _length(" ".join(longer))
    if share * NEAR <= 1 and is_long:
        return "near"
    return "similar" if share * SIMILAR <= 1 and size >= SIMILAR else ""


def _share_changed(longer: list[str], shorter: list[str]) -> float:
    """The share of words that are changed, added or lost; a misspelt word counts half. 1 if it is above one in 6."""
    most = len(longer) // SIMILAR
    changed: float = Levenshtein.distance(longer, shorter, score_cutoff=2 * most)
    if changed > 2 * most:
        return 1
    if changed * NEAR > len(longer) and len(longer) < LONG:
        edits = [edit for edit in Levenshtein.editops(longer, shorter) if edit.tag == "replace"]
        changed -= sum(_is_misspelt(longer[edit.src_pos], shorter[edit.dest_pos]) for edit in edits) / 2
    return changed / max(1, len(longer))


def is_near_copy(a: str, b: str) -> bool:
    """Whether one text is an exact or near copy of the other."""
    ours, theirs = ([*map(normal_text, _variants(text))] for text in (a, b))
    return ours[0] in theirs or theirs[0] in ours or _compare(_words(a), _words(b)) == "near"


class _Numbers:
    """The numbers of texts by a hash of 64 bits, in two arrays."""

    def __init__(self, hashes: array):
        order = np.argsort(_array(hashes), kind="stable")
        self.hashes, self.numbers = _array(hashes)[order], order.astype(np.int32)

    def first(self, key: int) -> int:
        """The number of the first text with a hash; -1 if there is none."""
        place = int(np.searchsorted(self.hashes, key))
        return int(self.numbers[place]) if place < len(self.hashes) and self.hashes[place] == key else -1


def _windows(text: str) -> str:
    """Two parts of a long text; "" if they are of few words."""
    middle, end = len(text) // 3, 2 * len(text) // 3
    part = f"{text[middle : middle + WINDOW]} {text[end : end + WINDOW]}"
    return part if part.count(" ") > 2 * max(GRAMS) or UNSPACED.search(part) else ""


@cache
def _powers(bits: int) -> list[np.ndarray]:
    """The powers of MIX, and those of its inverse."""
    bases = (int(MIX), pow(int(MIX), -1, 1 << 32))
    return [np.cumprod(np.full(1 << bits, base, np.uint32), dtype=np.uint32) for base in bases]


def _hash_grams(texts: Sequence[str], sizes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The n-grams of texts, by which they are indexed or, with `sizes`, looked up; and of short ones all letters.

    Args:
        texts: any texts.
        sizes: where a text is a part of a longer one, how many words that has at most.
    Returns:
        hash of each n-gram, number of its text, and how many of this text's rarest n-grams are enough: with one
        word in 6 changed, one of them is left.
    """
    data = (" " + " \0 ".join([*map(_spaced, texts), ""])).encode()
    codes = np.frombuffer(data, np.uint8) ^ SPACE
    starts = np.flatnonzero(codes[1:].astype(bool) > codes[:-1].astype(bool)) + 1  # of the words
    up, down = (powers[: len(codes)] for powers in _powers(len(codes).bit_length()))
    hashes = np.add.reduceat(codes * up, starts, dtype=np.uint32) * down[starts] if len(starts) else up[:0]
    is_end = codes[starts] == SPACE
    ends = np.flatnonzero(is_end)
    counts = np.diff(ends, prepend=-1) - 1
    owners = np.repeat(np.arange(len(ends), dtype=np.int32), counts + 1)
    wanted = (counts if sizes is None else np.maximum(counts, sizes)).astype(np.int32)[owners]
    short = np.flatnonzero(counts < SHORT)
    places = [0, *(starts[ends] + 1).tolist()]
    letters = (
        crc32(data[places[n] : places[n + 1] - 1].replace(b" ", b"") or texts[n].strip().encode())
        for n in short.tolist()
    )
    found = [(np.fromiter(letters, np.uint32, len(short)), short.astype(np.int32), np.full(len(short), 1 << 30))]
    rolled = hashes
    for length in range(2, min(max(GRAMS), len(hashes)) + 1):
        rolled = rolled[:-1] * MIX + hashes[length - 1 :]
        if length in GRAMS:
            low, high = GRAMS[length][sizes is not None]
            of, size = owners[: len(rolled)], wanted[: len(rolled)]
            chosen = (of == owners[length - 1 :]) & (low <= size) & (size <= high) & ~is_end[length - 1 :]
            quota = np.minimum(2 + length * (size // SIMILAR), 1 + size * 3 // 4)
            found.append((rolled[chosen], of[chosen], quota[chosen]))
    hashes, owners, quotas = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return hashes, owners, quotas


class NearCopies:
    """An index of texts, in arrays. It is the same in every process."""

    def __init__(self, texts: Iterable[str]):
        exact, keys, ends = array("q"), array("q"), array("q", [0])
        self._words = bytearray()  # of all texts, one after the other
        counts = np.zeros(1 << 22, np.uint32)  # how often n-grams occur, by the first bits of their hash
        found: list[Any] = []
        texts = iter(texts)
        while batch := list(islice(texts, BATCH)):
            bare = [_variants(text)[0] for text in batch]
            exact.extend(map(text_id, batch))
            keys.extend(text_id(normal_text(text)) for text in bare)
            hashes, owners, quotas = _hash_grams(bare)
            np.add.at(counts, hashes >> 10, 1)
            found.append((hashes, owners, quotas))
            for text in map(_words, bare):
                self._words += text.encode()
                ends.append(len(self._words))
        self._exact, self._keys, self._ends = _Numbers(exact), _Numbers(keys), _array(ends)
        for start, (hashes, owners, quotas) in enumerate(found):
            order = np.lexsort((hashes, counts[hashes >> 10], owners))
            hashes, owners, quotas = hashes[order], owners[order], quotas[order]
            kept = np.arange(len(owners)) - np.searchsorted(owners, owners) < quotas
            found[start] = hashes[kept].astype(np.uint64) << HALF | (owners[kept] + start * BATCH).astype(np.uint64)
        # hash of an n-gram and number of its text, 32 bits each
        self._grams = np.concatenate([*found, np.zeros(0, np.uint64)])
        del found
        self._grams.sort()
        self._shift = np.uint32(32 - min(32, max(16, len(self._grams).bit_length() + 4)))  # 16 to 32 bits for each
        self._bits = np.zeros(1 << (29 - int(self._shift)), np.uint8)
        for part in np.array_split(self._grams, 1 + len(self._grams) // (1 << 20)):
            places = (part >> HALF).astype(np.uint32) * MIX >> self._shift
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
        parts: list[tuple[str, int, int]] = []  # text, number, and the size of the text of which it is a part
        for number, text in enumerate(texts):
            if len(text) > LONG and (windows := _windows(text)):
                parts.append((windows, number, len(text)))
            elif any(map(text.count, SEPARATORS)):
                parts += [(variant, number, 0) for variant in _variants(text)]
            else:
                parts.append((text, number, 0))
        owners, sizes = (np.array([part[place] for part in parts], np.int64) for place in (1, 2))
        grams, of, _ = _hash_grams([part[0] for part in parts], sizes)
        known = self._known(grams)
        of, grams = owners[of[known]], grams[known]
        found = [Match()] * len(texts)
        for number in np.unique(of).tolist():
            found[number] = self._find(texts[number], grams[of == number])
        return found

    def _find(self, text: str, grams: np.ndarray) -> Match:
        if (number := self._exact.first(text_id(text))) >= 0:
            return Match("exact", number)
        variants = _variants(text)
        for variant in variants:
            if (number := self._keys.first(text_id(normal_text(variant)))) >= 0:
                return Match("near", number)
        words = _words(variants[0])
        size = words.count(" ") + 1
        if len(text) > LONG:
            grams, _, _ = _hash_grams([words], np.zeros(1, np.int64))
        numbers, shared = np.unique(self._owners(np.unique(grams)), return_counts=True)
        other_length = np.abs(self._ends[numbers + 1] - self._ends[numbers] - len(words.encode()))
        fit = (shared * SHARE >= size) & (other_length < len(words) / 5 + 10 * PROMPT_WORDS)
        numbers, shared, other_length = numbers[fit], shared[fit], other_length[fit]
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
