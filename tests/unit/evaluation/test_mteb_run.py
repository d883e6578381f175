import argparse
import json
import shutil
from pathlib import Path

import mteb
import numpy as np
import pytest
from helpers import INSTRUCTION, make_model_folder
from local_tasks import Broken, Classification, Deadly, Reranking, Retrieval, Sts
from mteb import ResultCache

from gritlm.errors import UserError
from gritlm.evaluation import mteb_run
from gritlm.evaluation.benchmarks import Selection
from gritlm.evaluation.evaluate import parse
from gritlm.evaluation.mteb_run import make_job, run_benchmarks
from gritlm.evaluation.mteb_tasks import run_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory, qwen3):
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_model_folder(qwen3, path, query_max_len=64, passage_max_len=64, prompts={"query": INSTRUCTION})
    return path


def arguments(model: Path | str, out: Path, **more) -> argparse.Namespace:
    flags = [part for name, value in more.items() for part in (f"--{name}", str(value)) if value is not True]
    flags += [f"--{name}" for name, value in more.items() if value is True]
    return parse([str(model), "--benchmark", "local", "--output_folder", str(out), *flags])


@pytest.fixture
def run(monkeypatch, capsys):
    """`gritlm evaluate` on tasks of the tests, which mteb's registry does not have."""

    def run(tasks: list, *args, **options) -> tuple[int, str]:
        selection = Selection(tasks, private=["LocalPrivate"], remarks=["a remark"])
        monkeypatch.setattr(mteb_run, "find_tasks", lambda *_: selection)
        capsys.readouterr()
        code = run_benchmarks(arguments(*args, **options))
        return code, capsys.readouterr().out

    return run


def results_of(out: Path) -> dict[str, Path]:
    return {path.stem: path for path in out.rglob("results/*/*/Local*.json")}


def test_failures_are_listed_and_the_rest_is_kept_as_mteb_stores_it(run, folder, tmp_path):
    offline = mteb.get_task("STS12")
    code, said = run([Broken(), Retrieval(), offline, Sts()], folder, tmp_path)
    assert code == 1
    assert "  LocalBroken: RuntimeError: no such data second line" in said
    assert "  STS12: its data mteb/sts12-sts is not in the cache and cannot be fetched: " in said
    assert "gritlm/tiny: missing 2 of 4:" in said and "Traceback" not in said
    assert "their data is private: LocalPrivate" in said and "a remark" in said
    loaded = ResultCache(tmp_path).load_results(tasks=["LocalRetrieval", "LocalSTS"])
    (model,) = loaded.model_results
    assert model.model_name == "gritlm/tiny" and {r.task_name for r in model.task_results} == {
        "LocalRetrieval",
        "LocalSTS",
    }
    meta = json.loads(next(tmp_path.rglob("model_meta.json")).read_text())
    wanted = {"name": "gritlm/tiny", "revision": model.model_revision, "embed_dim": 32, "max_tokens": 64}
    assert wanted.items() <= meta.items() and meta["n_parameters"] > meta["n_embedding_parameters"] > 0
    assert meta["similarity_fn_name"] == "cosine" and "GritLM" in meta["framework"]
    table = json.loads(next(tmp_path.glob("tables/*.json")).read_text())["models"][0]
    scores = {r.task_name: r.get_score() for r in model.task_results}
    assert table["scores"] == pytest.approx(scores, abs=1e-5) and set(table["failed"]) == {"LocalBroken", "STS12"}
    assert table["means"]["Mean(Task)"][1:] == [pytest.approx(sum(scores.values()) / 2, abs=1e-5), 2]
    rows = [line.split("\t") for line in next(tmp_path.glob("tables/*.tsv")).read_text().splitlines()]
    assert rows[0] == ["task", "type", "gritlm/tiny"] and rows[1] == ["LocalBroken", "Retrieval", "-"]
    assert list(tmp_path.rglob("*.vectors")), "what is missing may need them again"
    run([Retrieval(), Sts()], folder, tmp_path)
    assert not list(tmp_path.rglob("*.vectors"))


def test_a_run_goes_on_with_what_is_missing_or_damaged(run, folder, tmp_path):
    run([Retrieval(), Sts()], folder, tmp_path)
    first = {name: path.stat().st_mtime_ns for name, path in results_of(tmp_path).items()}
    results_of(tmp_path)["LocalSTS"].write_text('{"dataset_re')  # as a full disk leaves what is not written aside
    code, said = run([Retrieval(), Sts(), Reranking()], folder, tmp_path)
    assert code == 0 and "LocalSTS: its stored result is damaged" in said
    after = {name: path.stat().st_mtime_ns for name, path in results_of(tmp_path).items()}
    assert set(after) == {"LocalRetrieval", "LocalSTS", "LocalReranking"}
    assert after["LocalRetrieval"] == first["LocalRetrieval"] and after["LocalSTS"] > first["LocalSTS"]
    run([Retrieval()], folder, tmp_path, overwrite=True)
    assert results_of(tmp_path)["LocalRetrieval"].stat().st_mtime_ns > first["LocalRetrieval"]


def test_a_revision_stands_for_all_that_the_scores_depend_on(folder, tmp_path):
    tasks = [("LocalSTS", "STS")]
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"STS": "Retrieve"}')
    other = shutil.copytree(folder, tmp_path / "other" / "tiny")
    contract = json.loads((other / "text_contract.json").read_text())
    (other / "text_contract.json").write_text(json.dumps(contract | {"pooling_method": "lasttoken"}))

    def revision(model=folder, **options) -> str:
        return make_job(str(model), arguments(model, tmp_path, **options), tasks).revision

    own = revision()
    assert own == revision(query_max_len=64) == revision(chunk_tokens=99), "the same scores"
    changed = [{"query_max_len": 32}, {"passage_max_len": 32}, {"prompts": str(prompts)}, {"model": other}, {"seed": 1}]
    assert len({own, *(revision(**options) for options in changed)}) == 6


def test_processes_share_the_tasks_and_survive_one_that_is_killed(folder, tmp_path, capsys):
    tasks = [Retrieval(), Deadly(), Sts(), Classification()]
    kinds = [(task.metadata.name, task.metadata.type) for task in tasks]
    alone = run_tasks(make_job(str(folder), arguments(folder, tmp_path / "one"), kinds), [tasks[0], *tasks[2:]])
    shared = run_tasks(make_job(str(folder), arguments(folder, tmp_path / "two"), kinds), tasks, processes=2)
    assert [outcome.task for outcome in shared] == [name for name, _ in kinds]
    assert shared[1].score is None and shared[1].why == "its process ended with exit code -9"
    scores = [outcome.score for outcome in shared if outcome.score is not None]
    assert scores == [outcome.score for outcome in alone] and len(scores) == 3
    assert results_of(tmp_path / "two").keys() == results_of(tmp_path / "one").keys()
    settings = next((tmp_path / "two").rglob("run_settings.jsonl")).read_text().splitlines()
    assert len(settings) == 3, "no process overwrites the lines of another"
    assert "[4/4]" in capsys.readouterr().out


def test_nothing_measured_is_exit_code_2(run, folder, tmp_path):
    code, said = run([Broken()], folder, tmp_path)
    assert code == 2 and "missing 1 of 1" in said


def test_other_models_and_published_scores_stand_in_one_table(run, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "plain")
    (other / "text_contract.json").unlink()  # any model of sentence-transformers
    published = tmp_path / "published.json"
    published.write_text('{"paper": {"LocalRetrieval": 51.5, "Elsewhere": 3}, "none": {"Elsewhere": 1}}')
    tasks = [Retrieval()]
    code, said = run(tasks, folder, tmp_path, against=str(other), published=str(published))
    assert code == 0
    heads, row = (line.split() for line in said.splitlines() if line.startswith(("task ", "LocalRetrieval ")))
    assert heads[2:] == ["gritlm/tiny", "gritlm/plain", "paper"] and row[-1] == "0.5150"
    code, said = run(tasks, "bm25", tmp_path, published=str(tmp_path))
    heads, row = (line.split() for line in said.splitlines() if line.startswith(("task ", "LocalRetrieval ")))
    assert code == 0 and set(heads[2:]) == {"mteb/baseline-bm25s", "gritlm/tiny", "gritlm/plain"}
    assert float(row[2]) > 0.5 > float(row[3]), "words are found, an untrained model finds little"
    code, said = run([Retrieval(), Sts()], "bm25", tmp_path)
    assert code == 1 and "LocalSTS: TypeError" in said
    code, said = run(tasks, folder, tmp_path, against="bm25", max_drop=0.01)
    assert code == 1, "it is worse than BM25 by more than 0.01"


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"paper": {"A": "x"}}', "paper: wanted a score"), ('{"paper": 3}', "paper: wanted a score"), ("[1]", "list")],
)
def test_a_wrong_published_file_is_one_line(run, folder, tmp_path, content, message):
    (tmp_path / "published.json").write_text(content)
    with pytest.raises(UserError, match=message):
        run([Retrieval()], folder, tmp_path, published=str(tmp_path / "published.json"))
    with pytest.raises(UserError, match="found no folder named results"):
        run([Retrieval()], folder, tmp_path, published=str(tmp_path / "nothing"))


def test_a_model_with_damaged_weights_scores_nothing(run, folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file({name: np.full_like(value, np.nan) for name, value in weights.items()}, broken / "model.safetensors")
    with pytest.raises(UserError, match=r"\S"):
        run([Sts()], broken, tmp_path)
