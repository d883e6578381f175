import copy

import mteb
import pytest

from gritlm.errors import UserError
from gritlm.evaluation.benchmarks import find_tasks


@pytest.mark.parametrize(
    ("name", "tasks", "private"),
    [
        ("MTEB(Multilingual, v2)", 131, 0),
        ("MTEB(eng, v2)", 41, 0),
        ("MTEB(Code, v1)", 12, 0),
        ("RTEB(beta)", 17, 13),
        ("BRIGHT", 12, 0),
        ("BRIGHT(v1.1)", 20, 0),
        ("NanoBEIR", 13, 0),
        ("SciFact", 1, 0),
    ],
)
def test_names_resolve_without_a_network(name, tasks, private):
    found = find_tasks([name])
    assert (len(found.tasks), len(found.private)) == (tasks, private)
    assert not any("Long" in task.metadata.name for task in found.tasks) or name == "BRIGHT(v1.1)"
    assert bool(found.remarks) == (name == "BRIGHT")
    if name.startswith("MTEB(eng"):  # its tasks in English only, as mteb has filtered them
        kept = {task.metadata.name: task.hf_subsets for task in mteb.get_benchmark(name).tasks}
        assert {task.metadata.name: task.hf_subsets for task in found.tasks} == kept
        assert kept["STS17"] == ["en-en"]


def test_a_task_in_two_benchmarks_is_run_once():
    both = find_tasks(["MTEB(eng, v2)", "MTEB(Code, v1)", "MTEB(eng, v2)", "STS12"]).tasks
    assert len(both) == len({task.metadata.name for task in both}) == 53


def test_languages_and_seed():
    name = "MTEB(Multilingual, v2)"
    before = copy.copy({task.metadata.name: len(task.hf_subsets) for task in mteb.get_benchmark(name).tasks})
    german = find_tasks([name], ["deu"], seed=7)
    assert 0 < len(german.tasks) < 131 and german.other_languages == 131 - len(german.tasks)
    assert {task.seed for task in german.tasks} == {7}
    belebele = next(task for task in german.tasks if task.metadata.name == "BelebeleRetrieval")
    assert 0 < len(belebele.hf_subsets) < len(belebele.metadata.hf_subsets)
    after = {task.metadata.name: len(task.hf_subsets) for task in mteb.get_benchmark(name).tasks}
    assert after == before, "mteb's own lists are shared, and stay"


@pytest.mark.parametrize(
    ("names", "languages", "message"),
    [
        (["MTEB(Multilingal)"], [], "'MTEB(Multilingal)': found no benchmark .* MTEB.Multilingual, v2"),
        (["scifact"], [], "nearest are SciFact, "),
        (["STS12", "BRIHGT"], [], "'BRIHGT': .*BRIGHT"),
        ([""], [], "'': found no benchmark and no task of this name in mteb$"),
        (["Code1Retrieval"], [], "Code1Retrieval: nothing to run: .* private"),
        (["STS12"], ["deu"], "STS12: nothing to run: no task in deu"),
        (["STS12"], ["english"], "--langs: found 'english', wanted ISO 639-3 .*nearest are eng$"),
        (["STS12"], ["en"], "--langs: found 'en', .*nearest are eng"),
        (["STS12"], ["eng-Foo"], "--langs: found 'eng-Foo'"),
    ],
)
def test_an_unknown_name_is_one_line(names, languages, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")) as found:
        find_tasks(names, languages)
    assert "\n" not in str(found.value)
