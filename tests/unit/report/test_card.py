import json
import re
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from reports import EVIL, write_evaluation, write_run

from gritlm.models.text import TextContract
from gritlm.report.card import CardFacts, interval, parity_table, read_facts, write_card


@pytest.fixture
def model(tmp_path):
    """The files of a model folder that a card reads."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "hidden_size": 32, "is_causal": False, "dtype": "float32"})
    )
    TextContract(24, 48, prompts={"query": "Find:  it\n", "document": "", "hard": "a|b`c "}).save(folder)
    return folder


def card_of(model, facts: CardFacts) -> ModelCard:
    write_card(model, facts)
    return ModelCard.load(model / "README.md")


def test_the_card_of_a_run(model, tmp_path):
    run = write_run(tmp_path / "mine", steps=10, evaluation={"verdict": "nDCG@10 0.2 -> 0.6", "step": 10})
    for step, value in ((0, 0.2), (5, 0.4), (10, 0.6)):
        write_evaluation(run, step, value)
    card = card_of(model, read_facts(run))
    data = card.data.to_dict()
    assert data["base_model"] == "org/base" and data["library_name"] == "sentence-transformers"
    assert set(data["tags"]) == {"sentence-transformers", "feature-extraction", "sentence-similarity", "gritlm"}
    assert not {"license", "language", "datasets"} & data.keys(), "made up"
    results = {row.metric_type: (row.metric_value, row.dataset_name, row.task_type) for row in card.data.eval_results}
    assert results["ndcg@10"] == (0.6, "hard_held_out", "information-retrieval")
    for line in (
        "Bidirectional qwen3 backbone, mean pooling, normalised, 32 dimensions, float32. Trained with gritlm.",
        "- Base: `org/base`.",
        "- Licence: unknown; look up those of base and data.",
        "- Languages: unknown.",
        '| Prompt, directly before the text | `"Find:  it\\n"` | none |',
        "| Longest text in tokens, prompt included | 24 | 48 |",
        '| hard | `` "a\\|b`c " `` |',
        "| TEI | no: the instruction is pooled | prompt_name in each request, and normalize false for a model without "
        "unit norm; Qwen2 needs CUDA and float16 | read: 1.9.3 |",
        "| hard_held_out | ndcg@10 | 0.200 | 0.600 | [0.538, 0.662] | 5 |",
        "Against the base: nDCG@10 0.2 -> 0.6.",
        "| `--learning_rate` | `0.001` |",
        "| loss | █▄▃▂▂▂▁▁▁▁ | 3 (step 1) | 0.3 (step 10) |",
        "| hard_held_out, ndcg@10 | ▁▅█ | 0.2 (step 0) | 0.6 (step 10) |",
        "| hard | 40 | `f1` |",
        "2 × CPU.",
    ):
        assert line in card.text.splitlines(), line
    assert "--bf16" not in card.text and "Parity" not in card.text and str(tmp_path) not in card.content


def test_the_card_of_a_checkpoint_is_of_its_step(model, tmp_path):
    run = write_run(tmp_path / "mine", steps=10, evaluation={"verdict": "at the end", "step": 10})
    write_evaluation(run, 5, 0.4)
    card = card_of(model, read_facts(run / "checkpoint-5"))
    assert "Trained with gritlm, step 5." in card.text and "| 3 (step 1) | 0.6 (step 5) |" in card.text
    assert "| 0.400 |" in card.text and "at the end" not in card.text
    later = card_of(model, read_facts(run / "checkpoint-7"))
    assert "this run has evaluated no model at this step" in later.text and later.data.eval_results is None


def test_a_model_that_was_changed_has_no_evaluation_of_its_own(model, tmp_path):
    run = write_run(tmp_path / "mine", steps=10)
    write_evaluation(run, 10, 0.4)
    card = card_of(model, replace(read_facts(run), changed="cut to 16 dimensions"))
    assert card.data.eval_results is None and "After training: cut to 16 dimensions." in card.text
    assert "Measured during training, before the model was cut to 16 dimensions. The" in card.text
    assert card_of(model, read_facts(run)).data.eval_results, "control"


def test_without_a_run_everything_is_unknown(model, tmp_path):
    card = card_of(model, read_facts(tmp_path))
    assert card.text.count("nknown") >= 7
    assert card.data.base_model is None and card.data.eval_results is None


def test_the_licence_is_that_of_the_bases_own_card_or_of_the_flag(model, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    run = write_run(tmp_path / "mine", resolved={"model_name_or_path": str(base)})
    card = card_of(model, read_facts(run))
    assert card.data.license is None and "- Base: the local folder `base`." in card.text
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/first\n---\n# Base\n")
    card = card_of(model, read_facts(run))
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "org/first")
    assert "- Licence: apache-2.0, that of the base." in card.text
    assert "- Base: the local folder `base`, which was made from `org/first`." in card.text
    card = card_of(model, replace(read_facts(run), license="mit", language=("en", "de")))
    assert (card.data.license, card.data.language) == ("mit", ["en", "de"])
    assert "- Licence: mit." in card.text and "- Languages: en, de." in card.text
    for damaged in ("---\nlicense: [\n---\n", "\x00", "---\n- a\n---\n"):
        (base / "README.md").write_text(damaged)
        assert card_of(model, read_facts(run)).data.license is None


def test_data_of_the_hub_is_named_by_the_cards_of_prepare(model, tmp_path):
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    for given in (str(data / "train"), [str(data / "train")]):
        run = write_run(tmp_path / f"mine{len(given)}", resolved={"train_data": given})
        (data / "README.md").write_text("- source: /home/me/rows.csv\n")
        assert card_of(model, read_facts(run)).data.datasets is None
        (data / "README.md").write_text("# d\n\n- source: hub:org/pairs\n- licence: mit\n")
        assert card_of(model, read_facts(run)).data.datasets == ["org/pairs"]


def test_texts_of_others_stay_texts(model, tmp_path):
    start = {"data sets": [{"name": EVIL, "rows": 1, "fingerprint": EVIL}], "device": EVIL, "versions": {"torch": EVIL}}
    flags = {"model_name_or_path": EVIL, "seed": EVIL}
    run = write_run(tmp_path / "<b>|", starts=[start], evaluation={"verdict": EVIL}, resolved=flags, flags=flags)
    write_evaluation(run, 3, 0.5, name=EVIL, main=EVIL, metrics={EVIL: 0.5})
    card = card_of(model, read_facts(run))
    assert card.data.eval_results[0].dataset_name == " ".join(EVIL.split())
    outside_code = re.sub(r"```.*?```|(`+)(?!`).*?(?<!`)\1(?!`)", "", card.text.replace("\\`", ""), flags=re.DOTALL)
    assert "script>" in outside_code, "control: no such text is there"
    assert not re.search(r"(?<!\\)[<\[](script|b>|/script|http)", outside_code)
    tables = [line for line in card.text.splitlines() if line.startswith("| ") and "script" in line]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in tables}
    assert tables and columns <= {3, 4, 5, 7}


def test_the_parity_table_has_a_column_for_each_program_and_a_line_for_those_not_run(model):
    rows = [
        ("GritLM", "one word", 1.0),
        ("GritLM", "empty", 0.9999996),
        ("transformers", "one word", 0.99),
        ("transformers", "empty", "no token to pool"),
        ("ONNX Runtime", "all", "not run: onnxruntime is not installed"),
    ]
    assert parity_table(rows) == [
        "| Texts | GritLM | transformers |",
        "|---|---|---|",
        "| one word | 1.000000 | 0.990000 |",
        "| empty | 1.000000 | no token to pool |",
        "\nONNX Runtime: not run: onnxruntime is not installed.",
    ]
    card = card_of(model, CardFacts(parity=rows, parity_note="Of float32 weights.", scores=[[0.5, 0.25]], name="me/it"))
    assert "## Parity\n\nOf float32 weights.\n\n| Texts |" in card.text
    assert "Each prints the scores of the 1 query with the 2 passages, but for rounding: 0.5000, 0.2500." in card.text
    assert card.text.count('("me/it"') == 4 and card.text.lstrip().startswith("# it\n")


def test_the_interval_covers_the_true_mean_in_about_95_of_100():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        values = rng.beta(2, 3, 60)
        text = interval({"main": "m", "metrics": {"m": values.mean()}, "values": values.tolist(), "gold": None})
        low, high = json.loads(text)
        covered += low <= 0.4 <= high
    assert 0.91 < covered / 400 < 0.985
    alike = {"main": "m", "metrics": {"m": 0.0}, "values": [0.0] * 30}
    assert interval(alike) == ""
    few = {"main": "m", "metrics": {"m": 0.5}, "values": [0.5] * 3}
    assert interval(few) == ""


def test_the_interval_of_a_rank_correlation_is_fishers():
    def of(value, count):
        return interval({"main": "spearman", "metrics": {"spearman": value}, "values": [0.0] * count, "gold": []})

    assert of(0.6, 103) == "[0.446, 0.719]"  # tanh(0.6931 -+ 1.96 * sqrt(1.18 / 100)), by hand
    assert of(1.0, 103) == ""
