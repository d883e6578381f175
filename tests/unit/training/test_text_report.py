"""What a run says of its texts: prompts, doubtful rows, texts that are cut off. Each beside data without the fault."""

import json

import pytest
from helpers import INSTRUCTION

from gritlm.data.records import load_records
from gritlm.errors import UserError
from gritlm.models.text import TextContract
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer
from gritlm.training.arguments import DataArguments
from gritlm.training.text_report import report_on_texts

GOOD = {"query": [INSTRUCTION, "river stone"], "pos": ["lantern"], "neg": ["snow", "paper"]}


def rows(count: int = 20, **change) -> list[dict]:
    return [GOOD | change for _ in range(count)]


@pytest.fixture
def report(qwen3, tmp_path):
    """The lines and the warnings on data sets: `report(rows)`, `report(rows, more_rows, query_prompt="Q: ")`."""

    def make(*sets, query_prompt=None, ignore_columns=None, lengths=None, **contract):
        for number, some in enumerate(sets):
            path = tmp_path / "data" / f"set{number}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in some))
        prompts = {"query": INSTRUCTION, "document": ""}
        text_tokenizer = TextTokenizer(
            load_tokenizer(str(qwen3), TextContract()), TextContract(prompts=prompts, **contract)
        )
        records = load_records(tmp_path / "data", tmp_path / "cache")
        data, own = DataArguments(query_prompt=query_prompt, ignore_columns=ignore_columns), text_tokenizer.contract
        of_all = dict.fromkeys((r.name for r in records), (own.query_max_len, own.passage_max_len))
        return report_on_texts(records, text_tokenizer, data, of_all | (lengths or {}))

    return make


def test_good_data_is_not_doubted(report):
    lines, warnings = report(rows())
    assert lines == [f"  query prompt of the model: {INSTRUCTION!r}"]
    assert warnings == []


def test_strays_are_shown_with_their_share(report):
    lines, warnings = report([*rows(19), GOOD | {"query": "none"}])
    assert lines == [
        f"  query prompt of the model: {INSTRUCTION!r}; instructions of set0: 95.0% {INSTRUCTION!r}, 5.0% none"
    ]
    assert warnings == []


DOUBTS = {
    "no query prompt": (
        [[*rows(9, query=["A: ", "x"]), *rows(6, query=["B: ", "x"]), *rows(4, query="x"), GOOD]],
        "the model gets no query prompt: no instruction is that of nine rows of ten of set0 "
        "(45.0% 'A: ', 30.0% 'B: ', 20.0% none, and 1 more); --query_prompt names one",
    ),
    "no prompt for a smaller set": (
        [rows(), [*rows(3), *rows(3, query="x")]],
        "the model gets no prompt for set1: no instruction is that of nine of ten of its rows",
    ),
    "no document prompt": (
        [[*rows(10), *rows(10, pos=[["P: ", "a"]], neg=[["P: ", "b"]])]],
        "the model gets no document prompt: no instruction is that of nine passages of ten (60.0% none, 40.0% 'P: ')",
    ),
    "two spellings": (
        [[*rows(19), GOOD | {"query": [INSTRUCTION.replace(": F", ":  f"), "x"]}]],
        "one instruction in several spellings: "
        f"'Instruct:  find the answer\\nQuery: ' (1 texts), {INSTRUCTION!r} (19 texts)",
    ),
    "instructions that give the answer away": (
        [[*rows(), *rows(1, pos=[["P: ", "a"]])]],
        "set0: the instructions tell the positives from the negatives in 1 of 21 rows, which gives the answer away",
    ),
    "a label that gives the answer away": (
        [rows(pos=["passage: a"], neg=["b"])],
        "set0: the label 'passage:' tells positives from negatives, which gives the answer away",
    ),
    "a label of the negatives": (
        [rows(pos=["a"], neg=["bad: b"])],
        "set0: the label 'bad:' tells positives from negatives, which gives the answer away",
    ),
    "keys": (
        [[*rows(prompt="Represent it: ", type="normal"), *rows(3, type=1)]],
        'set0: keys that are not read: "type" (23 rows), "prompt" (20 rows); an instruction is read from '
        '"query": [instruction, text]',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DOUBTS)
def test_a_doubt_is_one_line(report, name):
    sets, wanted = DOUBTS[name]
    assert report(*sets)[1] == [wanted]


@pytest.mark.parametrize("key", ["label", "is_duplicate", "similarity_score", "split", "goldLabel"])
def test_a_label_or_split_that_is_not_read_stops_the_run(report, key):
    some = [*rows(), *rows(2, **{key: 0, "remark": [1, 2]})]
    with pytest.raises(UserError, match=f"set0: found the key '{key}' in 2 rows, .* --ignore_columns {key} trains on"):
        report(some)
    (warning,) = report(some, ignore_columns=[f"other,{key}"])[1]
    assert '"remark" (2 rows)' in warning and key not in warning
    for unclear in ("type", "labelling", "id"):  # controls
        assert len(report(rows(3, **{unclear: 0}))[1]) == 1


def test_what_reveals_nothing_is_no_doubt(report):
    both = rows(pos=[["P: ", "passage: a"]], neg=[["P: ", "passage: b"]])
    some = rows(2, pos=[["P: ", "a"], "b"], neg=[["P: ", "c"]]) + rows(2, pos=[["P: ", "a"]], neg=[])
    few = rows(9, pos=[["P: ", "note: a"]], neg=[["P: ", "b"]])
    for found in (both, some, few):
        assert not [line for line in report(found)[1] if "gives the answer away" in line]


def test_the_flag_settles_the_query_prompt_or_is_doubted(report):
    mixed = [*rows(10, query=["A: ", "x"]), *rows(10, query=["B: ", "x"])]
    assert report(mixed, query_prompt="B: ")[1] == []
    assert report(mixed, query_prompt="C: ")[1] == ["--query_prompt 'C: ' is the instruction of no row"]


def test_texts_that_are_cut_off_are_counted(report):
    room = 12  # the instruction has 9 tokens
    long = rows(10, query=[INSTRUCTION, "river stone engine copper"], pos=["lantern " * 30], neg=[])
    lines, warnings = report(rows(10, neg=[]), long, query_max_len=room, passage_max_len=24)
    assert lines[-2:] == [
        f"  10 of 20 queries looked at (set1 10 of 10) are cut to --query_max_len {room}",
        "  10 of 20 passages looked at (set1 10 of 10) are cut to --passage_max_len 24",
    ]
    assert warnings == [
        f"--query_max_len {room} leaves fewer than 8 tokens behind the instruction of 10 of 20 queries looked at "
        "(set1 10 of 10): raise it"
    ]
    lines, warnings = report(rows(10, neg=[]), long, query_max_len=32, passage_max_len=48)
    assert len(lines) == 1 and warnings == [], "control: there is room"


def test_each_data_set_has_its_own_lengths(report):
    both = {"query_max_len": 32, "passage_max_len": 24}
    text = rows(10, neg=[], pos=["snow " * 16])
    lines, _ = report(text, text, lengths={"set1": (32, 8)}, **both)
    assert lines[1:] == [
        "  10 of 20 passages looked at (set1 10 of 10) are cut to --passage_max_len 24 or the length of the data set"
    ]
    assert report(text, text, **both)[0][1:] == [], "control: the contract's"
