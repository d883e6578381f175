import json
import re

import mteb
import pytest
from mteb.models.model_meta import ModelMeta

from gritlm.errors import UserError
from gritlm.evaluation.prompts import OWN, VARIANT, Prompts

BENCHMARKS = {
    "MTEB(Multilingual, v2)": 131,
    "MTEB(eng, v2)": 41,
    "MTEB(Code, v1)": 12,
    "RTEB(beta)": 30,
    "BRIGHT(v1.1)": 20,
    "BRIGHT": 1,
    "NanoBEIR": 13,
}
FEVER = ("FEVERHardNegatives", "Retrieval")
QUERY, PASSAGE = "Instruct: a\nQuery: ", "Instruct: b\nQuery: "


def own_prompts():
    return json.loads(OWN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def metadata():
    """The metadata of each task of the benchmarks, by name."""
    lists = {name: [task.metadata for task in mteb.get_benchmark(name).tasks] for name in BENCHMARKS}
    assert {name: len({task.name for task in tasks}) for name, tasks in lists.items()} == BENCHMARKS
    return {task.name: task for tasks in lists.values() for task in tasks}


@pytest.fixture(scope="module")
def theirs():
    """The prompts of all tasks of mteb, without case and punctuation."""
    prompts = [task.metadata.prompt for task in mteb.get_tasks(exclude_superseded=False, exclude_private=False)]
    return {
        plain(text)
        for prompt in prompts
        if prompt
        for text in (prompt.values() if isinstance(prompt, dict) else [prompt])
    }


@pytest.fixture
def write(tmp_path):
    def write(prompts):
        path = tmp_path / "prompts.json"
        path.write_text(prompts if isinstance(prompts, str) else json.dumps(prompts))
        return str(path)

    return write


# ---- our instructions


def find_faults(prompts, metadata, theirs):
    texts = {
        (name, subset): text
        for name, value in prompts.items()
        for subset, text in (value if isinstance(value, dict) else {None: value}).items()
    }
    tasks = {(name, subset) for name, task in metadata.items() for subset in task.hf_subsets}
    faults = [("missing", name) for name, subset in tasks if not {(name, None), (name, subset)} & texts.keys()]
    types = {}
    for (name, _), text in texts.items():
        if plain(text) in theirs:
            faults.append(("copied", name))
        if not (text.isascii() and text == text.strip() and 4 <= len(text.split()) <= 40):
            faults.append(("form", name))
        if re.search(r"[.!?;:\n]( |\n|$)", text):
            faults.append(("sentences", name))
        if not re.match(
            r"Given (an?|the) .+?, (find|retrieve|rank) |(Classify|Decide|Estimate|Identify|Predict) ", text
        ):
            faults.append(("imperative", name))
        types.setdefault(text, set()).add(metadata[name].type if name in metadata else name)
    return faults + [("shared", text) for text, of in types.items() if len(of) > 1]


def plain(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def test_each_task_has_an_instruction_of_its_own(metadata, theirs):
    assert len(theirs) > 200 and find_faults(own_prompts(), metadata, theirs) == []
    prompts, ours = Prompts(), own_prompts()
    tasks = [(task.name, task.type) for task in metadata.values()]
    assert len(tasks) == 223 and prompts.notes(tasks) == []
    for name, task_type in tasks:
        assert prompts.source_of(name, task_type) == "gritlm"
        for subset in metadata[name].hf_subsets:
            wanted = ours[name][subset] if isinstance(ours[name], dict) else ours[name]
            assert prompts.instruction(name, task_type, "query", subset) == f"Instruct: {wanted}\nQuery: "
            assert prompts.instruction(name, task_type, "passage", subset) == ""


@pytest.mark.parametrize(
    ("fault", "change"),
    {
        "missing": {"STS12": None},
        "copied": {"STS12": "retrieve semantically similar text!"},
        "form": {"STS12": "Given a sentence, find it "},
        "sentences": {"STS12": "Given a sentence, find its like. It is news"},
        "imperative": {"STS12": "Sentences of the same meaning"},
        "shared": {"STS12": "Identify the main topic of a tweet"},
    }.items(),
)
def test_a_fault_in_our_instructions_is_seen(fault, change, metadata, theirs):
    prompts = {name: text for name, text in (own_prompts() | change).items() if text is not None}
    assert fault in dict(find_faults(prompts, metadata, theirs))


def test_the_file_is_sorted():
    names = list(own_prompts())
    assert names == sorted(names) and list(own_prompts()["BrightRetrieval"]) == sorted(own_prompts()["BrightRetrieval"])


def test_versions_of_a_task_share_its_instruction():
    prompts = Prompts()
    for name in ("FEVER", "FEVERHardNegatives.v2", "NanoFEVERRetrieval"):
        assert prompts.instruction(name, "Retrieval", "query") == prompts.instruction(*FEVER, "query")
        assert prompts.source_of(name, "Retrieval") == "gritlm"
    assert prompts.source_of("FEVER-PL", "Retrieval") == "type"
    texts = {}
    for name, text in own_prompts().items():
        assert texts.setdefault(VARIANT.sub("", name).lower(), text) == text


def test_a_task_of_another_name_gets_a_sentence_for_its_type():
    prompts = Prompts()
    for task_type, name in {"STS": "STS", "InstructionRetrieval": "InstructionRetrieval", "NoType": "default"}.items():
        assert prompts.instruction("MyTask", task_type, "query") == f"Instruct: {own_prompts()[name]}\nQuery: "
        assert prompts.instruction("MyTask", task_type, "passage") == ""
    (line,) = prompts.notes([("MyTask", "STS"), FEVER, *((f"Other{i}", "STS") for i in range(9))])
    assert "for MyTask, Other0," in line and line.count("Other") == 7 and "and 2 more" in line


# ---- the user's


@pytest.mark.parametrize(
    ("given", "query", "passage"),
    [
        ({"FEVERHardNegatives": "a"}, QUERY, ""),
        ({"FEVERHardNegatives": {"query": "a", "passage": "b"}}, QUERY, PASSAGE),  # Qwen3-Embedding
        ({"FEVERHardNegatives": {"query": "a", "document": "b"}}, QUERY, PASSAGE),  # mteb
        ({"FEVERHardNegatives": {"query": "a", "corpus": ""}}, QUERY, ""),  # GritLM
        ({"FEVERHardNegatives": {"instruction": "a"}}, QUERY, ""),
        ({"Retrieval": {"FEVERHardNegatives": {"query": "a", "corpus": "b"}}}, QUERY, PASSAGE),
        ({"Retrieval": {"NQ": "c"}, "default": "a"}, QUERY, ""),
        ({"FEVERHardNegatives-document": "b", "FEVERHardNegatives": "a"}, QUERY, PASSAGE),  # sentence-transformers
        ({"FEVERHardNegatives": "c", "FEVERHardNegatives-query": "a"}, QUERY, ""),
        ({"Retrieval": "a"}, QUERY, ""),
        ({"Retrieval": "a", "FEVERHardNegatives": "c"}, "Instruct: c\nQuery: ", ""),
        ({"STS": "c", "default": "a"}, QUERY, ""),
        ({"query": "query: ", "document": "passage: "}, "query: ", "passage: "),  # E5
        ({"FEVERHardNegatives": "Instruct: a\nQuery:"}, "Instruct: a\nQuery:", ""),
        ({"FEVERHardNegatives": "Find proof. Query: "}, "Find proof. Query: ", ""),
        ({"FEVERHardNegatives": "task: search | query: "}, "task: search | query: ", ""),
        ({"FEVERHardNegatives": "<|user|>\na\n<|embed|>\n"}, "<|user|>\na\n<|embed|>\n", ""),
        ({"FEVERHardNegatives": "Find answers to the query:"}, "Instruct: Find answers to the query:\nQuery: ", ""),
        ({"FEVERHardNegatives": " é "}, "Instruct:  é \nQuery: ", ""),  # as given, so that published figures repeat
        ({"default": ""}, "", ""),
        ({"FEVERHardNegatives": {"query": " ", "passage": "b"}}, "", PASSAGE),
    ],
    ids=str,
)
def test_forms_of_a_prompts_file(given, query, passage, write):
    prompts = Prompts(write(given))
    assert [prompts.instruction(*FEVER, side, "default") for side in ("query", "passage")] == [query, passage]
    assert prompts.source_of(*FEVER) == "file"


def test_the_users_prompt_of_another_task_or_side_changes_nothing(write):
    for given in ({"NQ": "a"}, {"STS": "a"}, {"Retrieval": {"NQ": "a"}}, {"FEVERHardNegatives": {"passage": "b"}}):
        prompts = Prompts(write(given))
        assert prompts.instruction(*FEVER, "query") == Prompts().instruction(*FEVER, "query")
        assert prompts.source_of(*FEVER) == "gritlm"


def test_a_subset_has_its_own_instruction(write):
    bright = ("BrightRetrieval", "Retrieval", "query")
    ours, theirs = Prompts(), Prompts(write({"BrightRetrieval": {"biology": {"query": "a", "passage": "b"}}}))
    assert len({ours.instruction(*bright, subset) for subset in own_prompts()["BrightRetrieval"]}) == 12
    assert theirs.instruction(*bright, "biology") == QUERY
    assert theirs.instruction("BrightRetrieval", "Retrieval", "passage", "biology") == PASSAGE
    assert theirs.instruction(*bright, "pony") == ours.instruction(*bright, "pony")
    assert theirs.source_of("BrightRetrieval", "Retrieval") == "file"
    assert Prompts(write({"BrightRetrieval": "a"})).instruction(*bright, "pony") == QUERY


def test_names_that_exist_nowhere_are_said(write):
    given = {
        "PawsX": "a",
        "MmarcoReranking": "a",
        "MSMARCO": "a",  # a task of mteb that is not evaluated here
        "MyTask": "a",
        "BrightRetrieval": {"biologie": "a"},
        "Retrieval": {"NQ": "a", "NoTask": "a"},
        "STS": "a",
        "default": "Instruct: a\nQuery: ",
    }
    count, unknown, whole = Prompts(path := write(given)).notes([FEVER, ("MyTask", "STS")])
    assert count == f"--prompts {path}: gives the instruction of 2 of 2 tasks"
    assert unknown.split("mteb has no ")[1] == (
        "BrightRetrieval/biologie, MmarcoReranking (did you mean MMarcoReranking?), PawsX, NoTask"
    )
    assert whole.endswith("used without --instruction_template: default")
    assert Prompts(write({"MyTask": {"part": "a"}})).notes([("MyTask", "STS")])[1:] == []  # a task of the user's own


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("", "no JSON"),
        ("{}", "found no task"),
        ("[]", "found list"),
        ('{"NQ": "a", "NQ": "b"}', "key 'NQ' given twice"),
        ('{"NQ": "\\ud800"}', r'NQ: found "\ud800", wanted a string of valid Unicode'),
        ({"NQ": 3}, "NQ: found 3, wanted a string"),
        ({"NQ": None}, "NQ: found null, wanted a string"),
        ({"NQ": ["a"]}, 'NQ: found ["a"], wanted a string'),
        ({"NQ-query": {"query": "a"}}, 'NQ-query: found {"query": "a"}, wanted a string'),
        ({"NQ": {}}, "NQ: found the keys [], wanted"),
        ({"NQ": {"query": "a", "pasage": "b"}}, "NQ: found the keys ['query', 'pasage'], wanted"),
        ({"NQ": {"query": "a", "instruction": "b"}}, "NQ: found the keys ['query', 'instruction'], wanted"),
        ({"NQ": {"query": "a", "passage": None}}, "NQ: passage: found null, wanted a string"),
        ({"BrightRetrieval": {"pony": 1}}, "BrightRetrieval: pony: found 1, wanted a string"),
        ({"NQ": "Instruct: a\nQuery: {query}"}, "NQ: found {query}, wanted the instruction alone"),
    ],
    ids=str,
)
def test_a_bad_file_is_refused_in_one_line(given, found, write):
    with pytest.raises(UserError, match=re.escape(found)) as refused:
        Prompts(path := write(given))
    assert str(refused.value).startswith(f"--prompts {path}") and "\n" not in str(refused.value)


def test_a_file_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"--prompts no\.json: No such file"):
        Prompts("no.json")


def test_the_template():
    def of(template):
        return Prompts(template=template).instruction("STS12", "STS", "query")

    text = own_prompts()["STS12"]
    assert of(r"Instruct: {instruction}\nQuery:") == f"Instruct: {text}\nQuery:"
    assert of("{instruction}: ") == f"{text}: "
    for template in ("", "Query: ", "Instruct: {}\nQuery:", "{instruction}{instruction}", "{instruction} {query}"):
        with pytest.raises(UserError, match=r"--instruction_template: found .*, wanted \{instruction\} once"):
            Prompts(template=template)


def test_the_fingerprint_changes_with_what_the_model_gets(write):
    tasks = [FEVER, ("BrightRetrieval", "Retrieval"), ("MyTask", "STS")]
    base = Prompts().fingerprint(tasks)
    assert re.fullmatch("[0-9a-f]{16}", base)
    assert Prompts().fingerprint(tasks[::-1]) == base
    assert Prompts(write({"NQ": "a"})).fingerprint(tasks) == base  # no prompt of these tasks
    others = [
        Prompts(write({"MyTask": "a"})),
        Prompts(write({"BrightRetrieval": {"pony": "a"}})),
        Prompts(write({"FEVERHardNegatives": {"passage": "a"}})),
        Prompts(template="{instruction} "),
    ]
    assert len({base, *(other.fingerprint(tasks) for other in others)}) == 5


# ---- the tasks whose training split is among the paper's training data


def test_the_tasks_that_the_papers_training_data_touches(metadata):
    trained = json.loads(OWN.with_name("trained_tasks.json").read_text())
    names = {name for names in trained.values() for name in names}
    assert {mteb.get_task(name).metadata.name for name in names} == names
    meta = ModelMeta.create_empty(overwrites={"name": "a/b", "training_datasets": names})
    assert meta.get_training_datasets() & metadata.keys() == {
        "FEVERHardNegatives",
        "HotpotQAHardNegatives",
        "MIRACLRetrievalHardNegatives",
        "NanoFEVERRetrieval",
        "NanoHotpotQARetrieval",
        "NanoMSMARCORetrieval",
        "NanoNQRetrieval",
        "NanoQuoraRetrieval",
        "T2Reranking",
        "XNLI",
    }
