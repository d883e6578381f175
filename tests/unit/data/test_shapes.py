"""The table of public shapes in docs/data.md: each is written as a small file here and read, or refused by name."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT

from gritlm.curation.prepare import main
from gritlm.data.columns import examples_of
from gritlm.data.raw import BadRows, Columns, Reading
from gritlm.data.shapes import SHAPES
from gritlm.errors import UserError

Q, P, N = "what is rain", "Water that falls.", "A loaf of bread."
PAIR, TRIPLE = (Q, [P], []), (Q, [P], [N])
IDS = "ids of a corpus in another file; give their texts"
STS = [{"sentence1": Q, "sentence2": P, "score": 4.6}, {"sentence1": Q, "sentence2": N, "score": 0.2}]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def beir(folder: Path, ids: str = "_id", qrels: str = "query-id\tcorpus-id\tscore\nq1\td1\t1\n") -> None:
    (folder / "qrels").mkdir(parents=True)
    (folder / "queries.jsonl").write_text(json.dumps({ids: "q1", "text": Q}) + "\n")
    passages = [{ids: "d1", "title": "", "text": P}, {ids: "d2", "title": "", "text": N}]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    (folder / "qrels" / "train.tsv").write_text(qrels)


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def mteb(folder: Path) -> None:
    parquet(folder / "corpus/corpus-00000-of-00001.parquet", [{"_id": "d1", "title": "", "text": P}])
    parquet(folder / "queries/queries-00000-of-00001.parquet", [{"_id": "q1", "text": Q}])
    parquet(folder / "data/train-00000-of-00001.parquet", [{"query-id": "q1", "corpus-id": "d1", "score": 1.0}])


def hub_clone(folder: Path) -> None:
    for split, query in (("train", Q), ("test", "another query")):
        parquet(folder / f"data/{split}-00000-of-00001.parquet", [{"query": query, "positive": P}])


def hub_configs(folder: Path) -> None:
    for name, query in (("pair", Q), ("triplet", "another query")):
        parquet(folder / f"{name}/train-00000-of-00001.parquet", [{"anchor": query, "positive": P}])
    files = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("pair", "triplet")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")


def saved(folder: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"query": Q, "positive": P}]).save_to_disk(folder)


# Name in docs/data.md -> file or folder, rows (a list: JSON lines; text: the file; a function: writes the folder),
# flags, and the rows or the refusal.
CASES: dict[str, tuple] = {
    "Pairs": ("a.jsonl", [{"anchor": Q, "positive": P}], "", [PAIR]),
    "Questions and answers": ("a.csv", f"Question,Answer\n{Q},{P}\n", "", [PAIR]),
    "Titles and bodies": ("a.jsonl", [{"title": Q, "abstract": P}], "", [PAIR]),
    "Triples": ("a.jsonl", [{"anchor": Q, "positive": P, "negative": N}], "", [TRIPLE]),
    "Several negatives": (
        "a.jsonl",
        [{"query": Q, "positive": P, "neg_1": N, "hard_negative": "A bus.", "rejected_response": ["A sea."]}],
        "",
        [(Q, [P], [N, "A bus.", "A sea."])],
    ),
    "MS MARCO triples": ("a.tsv", f"{Q}\t{P}\t{N}\n", "--no_header", [TRIPLE]),
    "MS MARCO triples of ids": (
        "a.tsv",
        "4011\t77120\t90233\n4012\t77121\t90234\n",
        "--no_header",
        "(4011, 4012) and no texts",
    ),
    "MS MARCO v2.1": (
        "a.jsonl",
        [
            {
                "query": Q,
                "passages": {"is_selected": [0, 1], "passage_text": [N, P], "url": ["", ""]},
                "answers": ["Water"],
            }
        ],
        "",
        [TRIPLE],
    ),
    "Passages with a flag each": (
        "a.jsonl",
        [{"query": Q, "passages": [{"is_relevant": True, "text": P}, {"is_relevant": False, "text": N}]}],
        "",
        [TRIPLE],
    ),
    "Sentence Transformers": ("a.jsonl", [{"query": Q, "pos": [P], "neg": [N]}], "", [TRIPLE]),
    "Sentence Transformers, arrays": ("a.jsonl", [[Q, P], ["another", P, N]], "", [PAIR, ("another", [P], [N])]),
    "Sentence Transformers, sets": ("a.jsonl", [{"set": [Q, P, "Drops."]}], "", [(Q, [P, "Drops."], [])]),
    "Sentence Transformers, InputExample": (
        "a.jsonl",
        [{"texts": [Q, P], "label": 0.9}, {"texts": [Q, N], "label": 0.1}],
        "--label_column label --positive_above 0.5",
        [TRIPLE],
    ),
    "BGE (FlagEmbedding)": (
        "a.jsonl",
        [
            {
                "query": Q,
                "pos": [P],
                "neg": [N],
                "pos_scores": [1],
                "neg_scores": [0.1],
                "prompt": "Find it",
                "type": "x",
            }
        ],
        "",
        [(["Instruct: Find it\nQuery: ", Q], [P], [N])],
    ),
    "MEDI (INSTRUCTOR)": (
        "a.jsonl",
        [{"query": ["Find it: ", Q], "pos": ["A text: ", P], "neg": ["A text: ", N], "task_id": 1}],
        "",
        [(["Find it: ", Q], [["A text: ", P]], [["A text: ", N]])],
    ),
    "Tevatron": (
        "a.jsonl",
        [{"query_id": "1", "query": Q, "positive_passages": [{"docid": "1", "title": "Rain", "text": P}]}],
        "",
        [(Q, [f"Rain {P}"], [])],
    ),
    "MIRACL, Mr. TyDi": (
        "a.jsonl",
        [
            {
                "query": Q,
                "positive_passages": [{"title": "", "text": P}],
                "negative_passages": [{"title": None, "text": N}],
            }
        ],
        "",
        [TRIPLE],
    ),
    "Tevatron with ids": ("a.jsonl", [{"query_text": Q, "positive_document_ids": ["1"], "answer": None}], "", IDS),
    "E5 with ids": ("a.jsonl", [{"query": Q, "positives": {"doc_id": ["1"], "score": [1.0]}}], "", IDS),
    "DPR": (
        "a.jsonl",
        [
            {
                "question": Q,
                "answers": ["Water"],
                "positive_ctxs": [{"title": "Rain", "text": P, "score": 5}],
                "negative_ctxs": [],
                "hard_negative_ctxs": [{"title": "", "text": N, "score": 1}],
            }
        ],
        "",
        [(Q, [f"Rain {P}"], [N])],
    ),
    "ms-swift": ("a.jsonl", [{"query": Q, "response": P, "rejected_response": [N]}], "", [TRIPLE]),
    "ms-swift messages": (
        "a.jsonl",
        [{"messages": user(Q), "positive_messages": [user(P)], "negative_messages": [user(N)]}],
        "",
        [TRIPLE],
    ),
    "NeMo": ("a.jsonl", [{"query": Q, "pos_doc": [P], "neg_doc": [N]}], "", [TRIPLE]),
    "NeMo with a corpus": ("a.jsonl", [{"question": Q, "corpus_id": "c", "pos_doc": [{"id": "1"}]}], "", IDS),
    "LlamaIndex": (
        "a.json",
        json.dumps(
            {"queries": {"1": Q}, "corpus": {"a": P, "b": N}, "relevant_docs": {"1": ["a"]}, "mode": "text"}, indent=1
        ),
        "",
        [PAIR],
    ),
    "MTEB reranking": ("a.jsonl", [{"query": Q, "positive": [P], "negative": [N]}], "", [TRIPLE]),
    "STS": ("a.jsonl", STS, "--label_column score --positive_above 3", [TRIPLE]),
    "NLI": (
        "a.jsonl",
        [
            {"premise": Q, "hypothesis": text, "label": label}
            for text, label in ((P, "entailment"), (N, "contradiction"))
        ],
        "--label_column label --positive_labels entailment",
        [TRIPLE],
    ),
    "NLI of SimCSE": ("a.csv", f"sent0,sent1,hard_neg\n{Q},{P},{N}\n", "", [TRIPLE]),
    "PAWS": (
        "a.tsv",
        f"id\tsentence1\tsentence2\tlabel\n1\t{Q}\t{P}\t1\n2\t{Q}\t{N}\t0\n",
        "--label_column label",
        [TRIPLE],
    ),
    "Quora question pairs": (
        "a.csv",
        f"id,qid1,qid2,question1,question2,is_duplicate\n1,1,2,{Q},{P},1\n2,1,3,{Q},{N},0\n",
        "--label_column is_duplicate",
        [TRIPLE],
    ),
    "Quora on the hub": (
        "a.jsonl",
        [{"questions": {"id": [1, 2], "text": [Q, P]}, "is_duplicate": True}],
        "--label_column is_duplicate",
        [PAIR],
    ),
    "Pairs with a label": (
        "a.jsonl",
        [{"question": Q, "answer": P, "label": 1}, {"question": Q, "answer": N, "label": 0}],
        "--label_column label",
        [TRIPLE],
    ),
    "Responses with a list of labels": (
        "a.jsonl",
        [{"query": Q, "response": [P, N], "label": [1, 0]}],
        "--label_column label",
        [TRIPLE],
    ),
    "A column that names the split": (
        "a.jsonl",
        [{"query": Q, "positive": P, "split": "train"}, {"query": "another", "positive": P, "split": "test"}],
        "--split train",
        [PAIR],
    ),
    "SQuAD": (
        "a.jsonl",
        [{"id": "1", "title": "R", "context": P, "question": Q, "answers": {"text": ["Water"], "answer_start": [0]}}],
        "",
        [PAIR],
    ),
    "Natural Questions, GooAQ": ("a.jsonl", [{"question": Q, "short_answer": None, "answer": P}], "", [PAIR]),
    "Natural Questions of Google": (
        "a.jsonl",
        [{"document": {"html": ""}, "question": {"text": Q}, "annotations": {}}],
        "",
        "Natural Questions: HTML",
    ),
    "HotpotQA": (
        "a.jsonl",
        [{"question": Q, "answer": "Water", "context": {"title": ["R"]}, "supporting_facts": {}}],
        "",
        "supporting_facts as",
    ),
    "ELI5": (
        "a.jsonl",
        [{"q_id": "1", "title": Q, "answers": {"text": [P], "score": [3]}}],
        "",
        "ELI5: answers with votes",
    ),
    "FEVER": (
        "a.jsonl",
        [{"claim": Q, "evidence": [[1, 2, "Rain", 0]], "label": "SUPPORTS"}],
        "",
        "FEVER: the evidence is no text",
    ),
    "KILT": ("a.jsonl", [{"input": Q, "output": [{"answer": "Water", "provenance": []}]}], "", IDS),
    "Answers with their contexts (RAG)": (
        "a.jsonl",
        [{"question": Q, "contexts": [P], "answer": "Water", "ground_truth": "Water"}],
        "--positive_column contexts",
        [PAIR],
    ),
    "Alpaca": ("a.jsonl", [{"instruction": "Say", "input": Q, "output": P}], "", [(f"Say\n{Q}", [P], [])]),
    "Dolly": ("a.jsonl", [{"instruction": Q, "context": "", "response": P, "category": "qa"}], "", [PAIR]),
    "Chats": (
        "a.jsonl",
        [{"messages": [*user(Q), {"role": "assistant", "content": P}]}],
        "",
        "a chat: conversations are not read",
    ),
    "ShareGPT": (
        "a.jsonl",
        [{"conversations": [{"from": "human", "value": Q}]}],
        "",
        "ShareGPT: conversations are not",
    ),
    "Preference pairs": ("a.jsonl", [{"prompt": Q, "chosen": P, "rejected": N}], "", [TRIPLE]),
    "Preference pairs without a prompt": (
        "a.jsonl",
        [{"chosen": f"{Q} {P}", "rejected": N}],
        "",
        "write the prompt apart",
    ),
    "Preference pairs of chats": (
        "a.jsonl",
        [{"prompt": Q, "chosen": user(P), "rejected": user(N)}],
        "",
        "the last messages",
    ),
    "Code search": ("a.jsonl", [{"docstring": Q, "code": P}], "", [PAIR]),
    "Parallel sentences": ("a.jsonl", [{"translation": {"en": Q, "de": "was ist Regen"}}], "", "two languages as two"),
    "A corpus": ("a.jsonl", [{"_id": "1", "title": "Rain", "text": P}], "", "a corpus: no queries are found"),
    "Text only": ("a.jsonl", [{"text": P}], "", "text only: no queries are found"),
    "Judgements": ("a.jsonl", [{"query-id": "1", "corpus-id": "2", "score": 1}], "", IDS),
    "A JSON array": ("a.json", json.dumps([{"query": Q, "positive": P}]), "", [PAIR]),
    "Lists written in cells": (
        "a.csv",
        f"query,pos,neg\n{Q},\"['{P}', 'Drops.']\",\"['{N}']\"\n",
        "",
        [(Q, [P, "Drops."], [N])],
    ),
    "Arrays of numpy in cells": ("a.csv", f"query,pos\n{Q},\"['{P}' 'Drops.']\"\n", "", "neither Python nor JSON"),
    "A table by columns (pandas)": ("a.jsonl", [{"query": {"0": Q}, "positive": {"0": P}}], "", "orient='records'"),
    "BEIR": ("set", beir, "", [PAIR]),
    "BEIR with TREC's judgements": ("set", lambda folder: beir(folder, qrels="q1 0 d1 1\n"), "", [PAIR]),
    "BEIR one folder down, `id` for `_id`": ("set", lambda folder: beir(folder / "scifact", "id"), "", [PAIR]),
    "MTEB, NanoBEIR": ("set", mteb, "", [PAIR]),
    "A clone of a hub data set": ("set", hub_clone, "", [PAIR]),
    "A clone with configurations": ("set", hub_configs, "--config pair", [PAIR]),
    "`save_to_disk`": ("set", saved, "", [PAIR]),
}


def write(path: Path, content) -> None:
    if callable(content):
        content(path)
    elif isinstance(content, str):
        path.write_text(content)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))


def table() -> dict[str, str]:
    """The table of shapes in docs/data.md: name -> the last column."""
    lines = (ROOT / "docs" / "data.md").read_text().split("## Public shapes\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    return {name: outcome for name, _, outcome in rows[2:]}


@pytest.mark.parametrize("name", CASES)
def test_a_public_shape_is_read_or_refused_by_name(name, tmp_path, capsys):
    file, content, flags, wanted = CASES[name]
    write(tmp_path / file, content)
    argv = [str(tmp_path / file), str(tmp_path / "out"), *flags.split()]
    outcome = table()[name]
    if isinstance(wanted, str):
        assert outcome.startswith("refused")
        with pytest.raises(UserError, match=re.escape(wanted)) as error:
            main(argv)
        assert "\n" not in str(error.value) and "skip_bad" not in str(error.value).replace("--skip_bad leaves", "")
        return
    assert outcome.startswith("read") and all(word in outcome for word in flags.split() if word.startswith("--"))
    assert main(argv) == 0
    (path,) = (tmp_path / "out" / "train").iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["query"], row["pos"], row["neg"]) for row in rows] == wanted
    assert "query <- " in capsys.readouterr().out


def test_the_documented_table_is_the_tested_one():
    assert [*table()] == [*CASES] and len(CASES) >= 35


def test_a_row_that_only_resembles_a_shape_is_read_by_its_columns():
    """Control of the table: columns that a shape also has."""
    rows = [
        {"query": Q, "positive": P, "set": "web", "messages": 3},
        {"question": Q, "answer": P, "context": ""},
        {"query": Q, "pos": [P], "corpus": "wiki"},
        {"claim": Q, "text": P, "evidence": "a page"},
        {"query": Q, "positive": [{"text": P, "id": "7"}], "conversations": []},
    ]
    for row in rows:
        found = examples_of([("f:1", row)], "f", Columns(), BadRows(), Reading())
        assert [(example.query, example.positives) for example in found] == [(Q, [P])]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.read], ids=lambda shape: shape.name)
def test_a_later_row_of_another_form_is_bad_and_named(shape):
    rows = {
        "sets of texts": [{"set": [Q, P]}, {"set": Q}, {"set": [Q]}],
        "ms-swift messages": [
            {"messages": user(Q), "positive_messages": [user(P)]},
            {"messages": [*user(Q), *user(Q)]},
        ],
        "InputExample": [{"texts": [Q, P]}, {"texts": 3}, {"texts": [Q]}],
        "alpaca": [{"instruction": Q, "output": P}, {"instruction": Q}],
        "LlamaIndex": [{"queries": {}, "corpus": {}, "relevant_docs": {"1": ["x"]}}],
        "SQuAD": [{"question": Q, "context": P, "answers": {"text": ["falls"], "answer_start": [11]}}, {"question": Q}],
        "Quora questions": [{"questions": {"text": [Q, P]}}, {"questions": {"text": [Q]}}, {"questions": 3}],
    }.get(shape.name)
    if rows is None:
        column = shape.name.split()[0]
        good = {"query": Q, column: [{"is_selected": 1, "text": P}]}
        rows = [good, {"query": Q, column: [{"is_selected": 5, "text": P}]}, {"query": Q, column: [{"text": P}]}]
    bad = BadRows(skip=True)
    numbered = [(f"f:{number}", row) for number, row in enumerate(rows, start=1)]
    try:
        found = len(list(examples_of(numbered, "f", Columns(), bad, Reading())))
    except UserError as error:  # no good row at all
        found = 0
        assert "found no row" in str(error)
    assert found + len(bad.messages) == len(rows) and bad.messages
    assert all(message.startswith("f:") for message in bad.messages)
