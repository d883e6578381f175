import json
import re
from html.parser import HTMLParser

from reports import EVIL, log_entry, write_evaluation, write_run

from gritlm.report.page import make_page
from gritlm.report.run import read_run

ALONE = {"meta", "path", "circle", "rect"}


class Tags(HTMLParser):
    """The tags of a page, which must be balanced, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.names: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(*folders) -> str:
    return make_page({folder.name: read_run(folder) for folder in folders})


def headings(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


def captions(page: str) -> list[str]:
    return re.findall("<figcaption>(.*?)</figcaption>", page)


def test_the_page_of_a_run(tmp_path):
    folder = write_run(tmp_path / "mine", steps=10)
    for step, value in ((0, 0.2), (5, 0.4), (10, 0.6)):
        write_evaluation(folder, step, value)
    page = page_of(folder)
    found = Tags(page)
    assert headings(page) == [
        *("Summary", "Loss", "Optimisation", "Speed", "Evaluation", "Space", "Data", "Texts", "To repeat")
    ]
    assert captions(page) == [
        *("Loss", "Loss terms", "Loss by data set", "Gradient norm", "Learning rate", "Tokens per second"),
        *("Where the time of a step goes, mean", "Evaluation", "Similarity: hard_held_out"),
    ]
    for text in ("finished", "10 of 30", "2 × CPU", "gritlm train --seed 1", "hard query, 3 tokens: [a ]b c", "f1"):
        assert text in found.text
    assert [found.names.count(tag) for tag in ("main", "h1", "figure")] == [1, 1, 9]


def test_the_page_needs_no_network_and_no_script(tmp_path):
    found = Tags(page_of(write_run(tmp_path / "mine", starts=[{"command": EVIL, "device": EVIL}])))
    assert not {"script", "link", "img", "iframe", "object"} & set(found.names)
    assert not {"src", "href", "srcset", "data"} & {name for name, _ in found.attributes}
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in found.attributes
    assert EVIL.split()[0] in found.text, "control: nothing was there to be escaped"


def test_all_text_from_data_is_escaped(tmp_path):
    entry = {**log_entry(1), f"loss/{EVIL}": 1.0, EVIL: 0.5, "time": EVIL}
    start = {"data sets": [{"name": EVIL, "rows": EVIL, "fingerprint": EVIL}], "examples": [EVIL, EVIL]}
    start |= dict.fromkeys(("command", "time", "host", "system", "device", "ranks"), EVIL) | {"versions": {EVIL: EVIL}}
    settings = {"starts": [start], "flags": {EVIL: EVIL}, "resolved": {EVIL: EVIL, "model_name_or_path": EVIL}}
    folders = []
    for name in ("a", "<b>&"):
        folder = write_run(tmp_path / name, log=json.dumps(entry) + "\n", evaluation={"verdict": EVIL}, **settings)
        write_evaluation(folder, 1, 0.5, name=EVIL, main=EVIL, metrics={EVIL: 0.5})
        folders.append(folder)
        settings = settings | {"resolved": {EVIL: name}}
    for page in (page_of(folders[0]), page_of(*folders)):
        assert "<script" not in page and "<b>" not in page
        assert len(re.findall("&lt;script&gt;", page)) > 20
        Tags(page)


def test_several_runs_share_figures_and_their_differences_are_listed(tmp_path):
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", steps=5)
    settings = json.loads((second / "run.json").read_text())
    settings["resolved"] |= {"learning_rate": 0.003, "new_flag": [1]}
    (second / "run.json").write_text(json.dumps(settings))
    page = page_of(first, second)
    table = re.search(r'aria-label="Settings that differ".*?</table>', page)[0]
    rows = dict(re.findall(r'<th scope="row">(\w+)</th><td>(.*?</td><td>.*?)</td>', table))
    assert rows == {"learning_rate": "0.001</td><td>0.003", "new_flag": "not set</td><td>[1]"}
    loss = re.search(r"<figcaption>Loss</figcaption>.*?</figure>", page)[0]
    assert re.findall(r"</svg>(\w+)</li>", loss) == ["first", "second"]
    assert {"Loss by data set: hard", "Loss by data set: plain"} <= set(captions(page))
    alike = page_of(first, write_run(tmp_path / "third"))
    assert "flags, versions, devices and data are alike" in alike


def test_runs_with_little_to_show(tmp_path):
    young = write_run(tmp_path / "young", steps=0, finished=False)
    page = page_of(young)
    assert "No step has been logged yet." in page and "Not evaluated" in page
    assert "not finished" in page and "none of 30" in page and captions(page) == []
    bare = write_run(tmp_path / "bare", steps=1, starts=[{}], resolved={})
    (bare / "log.jsonl").unlink()
    assert "The command is unknown." in page_of(bare)
    assert headings(page_of(young, bare))[1] == "Settings that differ"
    cut = write_run(tmp_path / "cut", log=json.dumps(log_entry(1)) + '\n{"step')
    assert "1 of 2 lines could not be read" in page_of(cut) and "could not be read" not in page


def test_a_long_run_gives_a_small_page(tmp_path):
    sets = {f"loss/data set {number}": 1.0 / (1 + number) for number in range(12)}
    log = "".join(json.dumps(log_entry(step, **sets)) + "\n" for step in range(1, 1001))
    one, two = (write_run(tmp_path / name, log=log) for name in ("one", "two"))
    assert len(log) > 500_000, "control: the log is not long"
    assert len(page_of(one)) < 150_000 and len(page_of(one, two)) < 300_000
