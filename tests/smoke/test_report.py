"""A real run: the card in its folders, and its page in a real browser (Debian: apt-get install chromium)."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import train, train_flags
from huggingface_hub import ModelCard

from gritlm.report.report import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (390, 1280)

# Frames of each width hold the page as it is. The script is that of the page around them.
AROUND = """<!DOCTYPE html><body>{frames}<pre id="found"></pre><script>
onload = () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    const figures = [...page.querySelectorAll("figure")].map(figure => [
      figure.querySelector("figcaption").textContent,
      [...figure.querySelectorAll(".marks > *")].filter(mark => {{
        const box = mark.getBBox(); return box.width > 0 || box.height > 0;
      }}).length,
      [...figure.querySelectorAll("svg:not(.swatch) text")].filter(text => {{
        const box = text.getBBox(), view = text.ownerSVGElement.viewBox.baseVal;
        return box.x < 0 || box.x + box.width > view.width || box.y < 0 || box.y + box.height > view.height;
      }}).length]);
    return {{width: root.clientWidth, needed: root.scrollWidth, figures: figures}};
  }});
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script>"""


@pytest.fixture(scope="module")
def run(qwen3, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    train(*train_flags(qwen3, data, folder / "mine", folder / "cache"))
    return folder / "mine"


def look(page: str, folder: Path) -> tuple[list[dict], list[str]]:
    """What the browser finds at each width: width, width needed, marks of each figure; and its console's lines."""
    frames = "".join(f'<iframe style="width:{w}px;border:0" srcdoc="{html.escape(page)}"></iframe>' for w in WIDTHS)
    around = folder / "around.html"
    around.write_text(AROUND.format(frames=frames), encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900", around.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search('<pre id="found">(.+?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium (Debian: apt-get install chromium)")
def test_the_page_in_a_browser(run, tmp_path):
    output = tmp_path / "page.html"
    assert main([str(run), "--output", str(output)]) == 0
    page = output.read_text(encoding="utf-8")
    found, console = look(page, tmp_path)
    assert console == []
    for frame, width in zip(found, WIDTHS, strict=True):
        assert frame["width"] == width and frame["needed"] <= width
        assert [caption for caption, _, _ in frame["figures"]] == [
            *("Loss", "Loss by data set", "Gradient norm", "Learning rate", "Tokens per second"),
            "Where the time of a step goes, mean",
        ]
        assert all(marks for _, marks, _ in frame["figures"])
        assert not any(outside for _, _, outside in frame["figures"]), "a label that is cut off"
    damaged = page.replace("<main>", '<main><img src="http://example.com/x"><p style="width:500px">wide</p>')
    damaged = re.sub('<g class="marks".*?</g>', '<g class="marks"></g>', damaged, flags=re.DOTALL)
    damaged = damaged.replace('text-anchor="end"', 'text-anchor="start"')
    (narrow, _), console = look(damaged, tmp_path)
    assert "Content Security Policy" in "".join(console), "control: the console is not read"
    assert narrow["needed"] > narrow["width"], "control: too wide a page is not noticed"
    assert not any(marks for _, marks, _ in narrow["figures"]), "control: an empty figure is not noticed"
    assert any(outside for _, _, outside in narrow["figures"]), "control: a label that is cut off is not noticed"


def test_a_run_leaves_a_card_in_each_model_folder(run):
    card = ModelCard.load(run / "README.md")
    assert card.data.library_name == "sentence-transformers"
    assert re.search(r"\| loss \| [▁-█]{6} \| \S+ \(step 1\) \| \S+ \(step 6\) \|", card.text)
    for line in ("| hard | 40 | `", "| plain | 48 | `", "- Base: the local folder `qwen3"):
        assert line in card.text
    checkpoint = (run / "checkpoint-3" / "README.md").read_text(encoding="utf-8")
    assert "Trained with gritlm, step 3." in checkpoint and "(step 3) |" in checkpoint
    assert "README.md" in json.loads((run / "checkpoint-3" / "checkpoint.json").read_text())["served"]
    (start,) = json.loads((run / "run.json").read_text())["starts"]
    assert start["examples"][1].startswith("  hard query, ")


def test_a_run_whose_log_somebody_has_damaged_still_gets_its_card(run, tmp_path, logged):
    from gritlm.training.run_folder import add_card

    folder = shutil.copytree(run, tmp_path / "mine")
    (folder / "README.md").unlink()
    (folder / "log.jsonl").write_bytes(b"\xff\n[]\n")
    add_card(folder, folder)
    assert "No loss is logged." in (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").unlink()
    (folder / "run.json").write_text("{")
    add_card(folder, folder)
    assert not (folder / "README.md").exists() and "README.md was not written: " in logged.text
    (folder / "README.md").mkdir()
    shutil.copyfile(run / "run.json", folder / "run.json")
    with pytest.raises(OSError):
        add_card(folder, folder)
