import os

import pytest
from reports import write_run

from gritlm.errors import UserError
from gritlm.report.report import main


def test_the_page_goes_into_the_run_and_replaces_an_earlier_one(tmp_path, capsys):
    run = write_run(tmp_path / "mine")
    for title in ("first", "second"):
        (run / "report.html").write_text(title)
        assert main([str(run)]) == 0
        assert "Training report: mine" in (run / "report.html").read_text()
    assert capsys.readouterr().out.startswith(f"{run / 'report.html'}: ")
    assert main([str(run), "--output", str(run / "report.html")]) == 0
    assert sorted(os.listdir(run)) == ["log.jsonl", "report.html", "run.json"]


def test_a_page_anywhere_else_is_never_replaced(tmp_path):
    run, other = write_run(tmp_path / "mine"), tmp_path / "other.html"
    assert main([str(run), "--output", str(other)]) == 0
    before = other.read_bytes()
    for output in (other, tmp_path):
        with pytest.raises(UserError, match="--output"):
            main([str(run), "--output", str(output)])
    assert other.read_bytes() == before
    with pytest.raises(UserError, match=r"wanted a name that ends in \.html"):
        main([str(run), "--output", str(tmp_path / "page.pdf")])


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    first, second = write_run(tmp_path / "a" / "mine"), write_run(tmp_path / "b" / "mine")
    assert main([str(first), str(second), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert f"Training report: {first}, {second}" in page
    with pytest.raises(UserError, match="found this run twice"):
        main([str(first), f"{first}/"])
    with pytest.raises(UserError, match=r"found no run\.json"):
        main([str(tmp_path)])
    assert not (tmp_path / "report.html").exists()
