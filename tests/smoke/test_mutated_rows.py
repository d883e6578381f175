"""Files of many rows, half of them mutated: each verb judges each row as the loader does, and none crashes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import make_model_folder, train_flags
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gritlm.cli import run_verb
from gritlm.curation import check_data, mine, prepare
from gritlm.data.rows import decode, parse_row, read_blocks
from gritlm.errors import UserError
from gritlm.models.text import titled
from gritlm.serving import encode
from gritlm.training import plan

ROWS = 100  # in a file
ROW = {"query": ["Q: ", "what is {}"], "pos": ["{} it is", "one {}"], "neg": ["not {}", ["", "nor {}"]], "id": "{}"}
# Rules that only prepare has. It reads scores, and takes "null" for an empty cell.
SCORES = r"(pos|neg)_scores(\[\d+\])?: "
STRICTER = rf"({SCORES}|query: found a list of two texts|\w+: found '\w+', the word of an empty cell)"
COLUMNS = ("--query_column", "query", "--positive_column", "pos", "--negative_columns", "neg")
PASSAGE = {"_id": "{}", "title": "About {}", "text": "it is {}"}

# ---- mutations: each turns an object or its line into another

_odd = st.sampled_from(["", " ", "\t\n", "\ud800", "\u2028", "\x00", "ﬁ 街", "NaN", "null", "[1]", "p" * 5000])
_scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _odd, st.text(max_size=4))
_values = st.recursive(
    _scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["text", "title", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)
_key = st.integers(0, 3)  # which key of the row
_new_key = st.sampled_from(["Query", "positive", "negatives", "text", "_id", "neg_scores", "meta", "", "pos "])
_at, _byte = st.integers(0, 120), st.binary(min_size=1, max_size=1)


def name(row: dict, key: int) -> str:
    return [*row][key % len(row)]


def replace(row: dict, key: int, value: object) -> None:
    row[name(row, key)] = value


def replace_item(row: dict, key: int, index: int, value: object) -> None:
    items = row[name(row, key)]
    replace(row, key, [*items[:index], value, *items[index + 1 :]] if isinstance(items, list) else value)


_of_objects = st.one_of(
    st.tuples(st.just(replace), _key, _values),
    st.tuples(st.just(replace_item), _key, st.integers(0, 1), _values),
    st.tuples(st.just(lambda row, key: row.pop(name(row, key))), _key),
    st.tuples(st.just(lambda row, key, new: row.update({new: row.pop(name(row, key))})), _key, _new_key),
    st.tuples(st.just(lambda row, new, value: row.update({new: value})), _new_key, _values),
    st.tuples(st.just(lambda row, key, other: replace(row, key, row[name(row, other)])), _key, _key),
    st.tuples(st.just(lambda row, key: replace(row, key, [row[name(row, key)]])), _key),
)
_of_lines = st.one_of(
    st.tuples(st.just(lambda line, at, more: line[:at] + more + line[at:]), _at, st.binary(max_size=3)),
    st.tuples(st.just(lambda line, at, byte: line[:at] + byte + line[at + 1 :]), _at, _byte),
    st.tuples(st.just(lambda line, at: line[:at]), _at),
    st.tuples(st.just(lambda line, key: line[:-1] + f', "{key}": 1}}'.encode()), st.sampled_from(["neg", "id", "x"])),
    st.tuples(st.just(lambda line, value: json.dumps(value).encode()), _values),
    st.tuples(st.just(lambda line, start: start + line), st.sampled_from([b"\xef\xbb\xbf", b"[", b" ", b"\r", b"//"])),
)
_mutated = st.tuples(st.integers(0, ROWS - 1), st.booleans(), _of_objects, _of_lines)
_mutations = st.lists(_mutated, min_size=ROWS // 2, max_size=ROWS // 2, unique_by=lambda mutated: mutated[0])


def write(path: Path, template: dict, mutations: list) -> Path:
    lines = []
    by_row = {row: others for row, *others in mutations}
    for number in range(ROWS):
        row = json.loads(json.dumps(template).replace("{}", f"thing {number}"))
        whole, (change, *values), (damage, *bytes_) = by_row.get(number, (None, (None,), (None,)))
        if whole:
            change(row, *values)
        line = json.dumps(row).encode()
        lines.append(damage(line, *bytes_) if whole is False else line)
    path.unlink(missing_ok=True)
    path.write_bytes(b"\n".join(lines))
    return path


# ---- what the loader says


def judge(path: Path, read=parse_row) -> tuple[dict[int, str], dict[int, object]]:
    """The loader's message on each bad line, or on the file as line 0; what it reads from each good line."""
    bad, good = {}, {}
    try:
        for block in read_blocks(path, None):
            for number, raw in block:
                try:
                    good[number] = read(decode(path, number, raw), f"{path}:{number}")
                except UserError as error:
                    bad[number] = str(error)
    except UserError as error:
        bad[0] = str(error)
    return bad, good


def with_lines(path: Path, numbers: list[int]) -> Path:
    lines = path.read_bytes().split(b"\n")
    some = path.with_name(f"some-{path.name}")
    some.unlink(missing_ok=True)
    some.write_bytes(b"".join(lines[number - 1] + b"\n" for number in numbers))
    return some


def instructions_of(row: dict) -> set[str]:
    return {row["query"]["instruction"], *row["pos"]["instruction"], *row["neg"]["instruction"]}


def texts_of(row: dict) -> tuple:
    """The query and the positives of a row, with their instructions. prepare ends an instruction with a space."""
    pairs = [tuple(row["query"].values()), *zip(row["pos"]["instruction"], row["pos"]["text"], strict=True)]
    query, *positives = [(instruction.rstrip(), text) for instruction, text in pairs]
    return query, frozenset(positives)


class Verbs:
    """Runs verbs in this process. An exception that is no error for the user fails the test."""

    def __init__(self, folder: Path, model: Path, capsys):
        self.folder, self.model, self.capsys, self.runs = folder, model, capsys, 0

    def run(self, main, *arguments) -> tuple[int, str, str]:
        code = run_verb(main, [*map(str, arguments)])
        out, err = self.capsys.readouterr()
        return code, out, err.replace("gritlm: error: ", "").rstrip("\n")

    def new(self) -> Path:
        self.runs += 1
        return self.folder / f"out-{self.runs}"

    def check_data(self, path: Path, bad: dict[int, str]) -> list[str]:
        """Returns the findings on instructions, with which training would refuse the file as well."""
        flags = ("--processes", 1, "--report", report := self.new(), "--model_name_or_path", self.model)
        code, _, _ = self.run(check_data.main, path, *flags, "--query_max_len", 32, "--passage_max_len", 48)
        found = [line.split("\t", 2)[1:] for line in report.read_text().split("\n") if line]
        instructions = [why for line, why in found if line == "0" and "instruction" in why]
        found = [(line, why) for line, why in found if "found " in why and why not in instructions]
        messages = {int(line): why if line == "0" else f"{path}:{line}: {why}" for line, why in found}
        assert not sorted(messages.items() ^ bad.items())
        assert code == 1 or not bad
        return instructions

    def plan(self, path: Path, bad: dict[int, str], instructions: list[str], rows: int) -> None:
        flags = train_flags(self.model, path, self.folder / "run", self.folder / "cache", global_batch_size=2)
        code, out, err = self.run(plan.main, *flags)
        if bad:
            assert (code, err) == (2, bad[min(bad)])
        elif instructions:
            assert code == 2 and err in instructions
        else:
            assert (code, err) == (0, "") and f" {rows} rows" in out

    def prepare(self, path: Path, bad: dict[int, str], good: dict[int, dict]) -> bool:
        code, _, err = self.run(prepare.main, path, out := self.new(), "--skip_bad", "--name", "rows", *COLUMNS)
        if code:
            assert code == 2 and err.count("\n") == 0 and str(path) in err
            return False
        _, written = judge(out / "train" / "rows.jsonl")
        kept = {texts_of(row) for row in written.values()}
        lost = [number for number, row in good.items() if texts_of(row) not in kept]
        skipped = (out / "skipped.txt").read_text() if lost else ""
        unexplained = [n for n in lost if not re.search(rf":{n}: {STRICTER}", skipped)]
        assert not unexplained, [(good[n], re.findall(f".*:{n}: .*", skipped)) for n in unexplained]
        return True

    def encode(self, path: Path, bad: dict[int, str], rows: int) -> None:
        code, _, err = self.run(encode.main, path, out := self.new().with_suffix(".npy"), "--model", self.model)
        assert (code, err) == (2, bad[min(bad)]) if bad else code == 0 and len(np.load(out)) == rows, err

    def mine(self, path: Path, bad: dict[int, str], good: dict[int, dict]) -> None:
        flags = ("--model", self.model, "--data_cache", self.folder / "cache", "--relative_margin", "none")
        code, _, err = self.run(mine.main, path, out := self.new(), *flags)
        if bad:
            assert (code, err) == (2, bad[min(bad)])
        else:
            assert code == 0, err
            _, written = judge(out / path.name)
            assert list(map(texts_of, written.values())) == list(map(texts_of, good.values()))


@pytest.fixture
def verbs(tmp_path, qwen3, capsys):
    return Verbs(tmp_path, qwen3, capsys)


def with_mutations(check, files: int) -> None:
    """Call `check(mutations)` for several files."""
    unhurried = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}
    settings(max_examples=files, database=None, derandomize=True, **unhurried)(given(_mutations)(check))()


def check_mutated_files(verbs: Verbs, files: int) -> None:
    prepared, faults = [], set()

    def check(mutations):
        path = write(verbs.folder / "rows.jsonl", ROW, mutations)
        bad, good = judge(path)
        faults.update(message.split(" ", 1)[1] for message in bad.values())
        prepared.append(verbs.prepare(path, bad, good))
        verbs.plan(path, bad, verbs.check_data(path, bad), len(good))
        if 0 not in bad:
            safe = [number for number, row in good.items() if instructions_of(row) <= {"", "Q: "}]
            path = with_lines(path, safe)
            assert not verbs.check_data(path, {})
            verbs.plan(path, {}, [], len(safe))

    with_mutations(check, files)
    assert len(faults) > 20 and sum(prepared) > len(prepared) / 2, "control: rows are mutated in many ways"


def test_a_few_files_with_mutated_rows(verbs):
    check_mutated_files(verbs, 4)


def test_control_another_verdict_is_seen(verbs):
    path = write(verbs.folder / "rows.jsonl", ROW, [(7, True, (replace, 0, ""), (None,))])
    bad, good = judge(path)
    assert [*bad] == [8]
    verbs.check_data(path, bad)
    for wrong in ({}, {9: bad[8]}, {8: bad[8] + "."}):
        with pytest.raises(AssertionError):
            verbs.check_data(path, wrong)
    assert verbs.prepare(path, bad, good)
    with pytest.raises(AssertionError):
        verbs.prepare(path, bad, good | {8: parse_row(ROW, "a row that is not there")})


@pytest.mark.long
def test_10_000_mutated_rows(verbs):
    check_mutated_files(verbs, 10_000 // (ROWS // 2))


@pytest.mark.long
def test_encode_and_mine_on_mutated_rows(verbs, qwen3):
    verbs.model = verbs.folder / "model"
    make_model_folder(qwen3, verbs.model, query_max_len=32, passage_max_len=48)

    def check(mutations):
        path = write(verbs.folder / "texts.jsonl", PASSAGE, mutations)
        bad, good = judge(path, titled)
        verbs.encode(path, bad, len(good))
        if 0 not in bad:
            verbs.encode(with_lines(path, [*good]), {}, len(good))
        path = write(verbs.folder / "rows.jsonl", ROW, mutations)
        bad, good = judge(path)
        verbs.mine(path, bad, good)
        if 0 not in bad:
            verbs.mine(with_lines(path, [*good]), {}, good)

    with_mutations(check, 200 // (ROWS // 2))
