"""Runs with other objectives through the command line: terms in the log, what is saved, and a resume."""

import json

import numpy as np
import torch
from helpers import DRIVER, batches_of, log_of, make_model_folder, run, train_flags
from safetensors.torch import load_file

from gritlm.data.records import load_records
from gritlm.data.teacher_vectors import TeacherVectors
from gritlm.serving.encode import main as encode
from gritlm.training.checkpoints import TEACHER_PROJECTION
from gritlm.training.flag_checks import parse
from gritlm.training.setup import make_plan


def test_a_run_with_many_terms_resumes_bit_for_bit(qwen3_dropout, data, tmp_path):
    """The projection on the teacher's width is trained, saved in checkpoints, and not in the model folder."""
    make_model_folder(qwen3_dropout, tmp_path / "teacher", projection=24)
    assert encode([str(data), str(tmp_path / "vectors"), "--rows", "--model", str(tmp_path / "teacher")]) == 0
    objective = {
        **{"teacher_vectors": tmp_path / "vectors", "teacher_weight": 0.5, "guide_margin": 0.05},
        **{"symmetric": True, "sigreg_weight": 0.1, "spread_out_weight": 0.1, "matryoshka_dims": 16},
        **{"mined_batches": tmp_path / "vectors", "cluster_size": 4},
    }

    def go(name: str, fault: str):
        flags = train_flags(qwen3_dropout, data, tmp_path / name, tmp_path / "cache", max_steps=6, **objective)
        return run(DRIVER, tmp_path / f"{name}-rows", fault, *flags, ranks=2)

    whole = go("whole", "-")
    assert whole.returncode == 0, whole.stderr[-3000:]
    line = "loss: 0.45 info_nce + 0.45 passage_to_query + 0.1 sigreg + 0.1 spread_out + 0.5 teacher, temperature 0.02"
    assert line + ", with --guide_margin; also at the widths 16 (1) of 32" in whole.stdout
    assert "  mined batches: clusters of 4 rows; similarity of a query" in whole.stdout
    args = parse(train_flags(qwen3_dropout, data, tmp_path / "whole", tmp_path / "cache", max_steps=6, **objective))
    records = load_records(data, tmp_path / "cache")
    plan = make_plan(args, records)
    for step in range(6):
        rows = [row for rank in (0, 1) for row in batches_of(tmp_path / "whole-rows", rank)[step][1]]
        assert rows == [f"{records[number].name}:{row}" for number, row in plan.batch(0, step).rows]
    assert go("cut", "kill:5").returncode != 0
    resumed = go("cut", "-")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming from" in resumed.stdout
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    projections = [load_file(tmp_path / name / "checkpoint-6" / TEACHER_PROJECTION) for name in ("whole", "cut")]
    assert all(torch.equal(projections[0][name], projections[1][name]) for name in projections[0])
    assert sorted(value.dim() for value in projections[0].values()) == [1, 2]
    assert not list((tmp_path / "whole").glob("*teacher*")), "the model folder is the served one"
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["matryoshka_dimensions"] == [32, 16]
    vectors = np.load(tmp_path / "vectors" / "vectors.npy")
    np.save(tmp_path / "vectors" / "vectors.npy", vectors[::-1])
    (tmp_path / "cut" / "modules.json").unlink()
    other = go("cut", "-")
    assert other.returncode == 2 and "holds another run: mined_batches was" in other.stderr
    assert "(and 1 more: teacher_vectors)" in other.stderr
    entry = log_of(tmp_path / "whole")[0]
    terms = {"info_nce", "info_nce@16", "passage_to_query", "passage_to_query@16", "sigreg", "spread_out", "teacher"}
    assert terms <= entry.keys()
    assert abs(sum(entry[name] for name in terms) - entry["loss"]) < 1e-4
    assert [entry["loss"] for entry in log_of(tmp_path / "whole")] == [e["loss"] for e in log_of(tmp_path / "cut")]


def test_each_text_of_the_rows_has_its_teachers_vector(qwen3, tmp_path):
    """Queries as queries, passages as passages; the same text once."""
    from gritlm import GritLM

    instruction = "Instruct: find it\nQuery: "
    make_model_folder(qwen3, tmp_path / "teacher", prompts={"query": instruction})
    rows = [
        {"query": [instruction, "river"], "pos": ["a stream", "water"], "neg": ["stone"]},
        {"query": [instruction, "rock"], "pos": ["stone"], "neg": ["water"]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        encode([str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), "--rows", "--model", str(tmp_path / "teacher")])
        == 0
    )
    teacher, (records,) = TeacherVectors(tmp_path / "out"), load_records(tmp_path / "rows.jsonl", tmp_path / "cache")
    teacher.check([records])
    assert len(teacher.ids) == 5
    model = GritLM(tmp_path / "teacher")
    for record in (records[0], records[1]):
        queries, passages = (
            model.encode_queries([record.query.text]),
            model.encode_corpus([p.text for p in record.positives]),
        )
        assert np.allclose(teacher.lookup([record.query_id]), queries, atol=2e-3)
        assert np.allclose(teacher.lookup(record.positive_ids), passages, atol=2e-3)
        assert not np.allclose(teacher.lookup([record.query_id]), model.encode_corpus([record.query.text]), atol=1e-2)
    assert not teacher.lookup([12345]).any(), "no such text"
