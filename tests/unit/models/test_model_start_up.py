"""What is imported before a model can be used. Start-up time is mostly the time of imports."""

import json

from helpers import make_model_folder
from processes import run

SLOW_TO_IMPORT = ("datasets", "pyarrow", "pandas", "sklearn", "sentence_transformers", "deepspeed")


def imported_by(code: str) -> set[str]:
    """The top-level modules that a new Python process has imported after the code."""
    code += "\nimport json, sys; print(json.dumps([name for name in sys.modules if '.' not in name]))"
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_model_is_loaded_and_used_without_slow_imports(qwen3, tmp_path):
    make_model_folder(qwen3, tmp_path)
    found = imported_by(f"from gritlm import GritLM; GritLM({str(tmp_path)!r}).encode(['river'])")
    assert "transformers" in found
    assert not found.intersection(SLOW_TO_IMPORT)


def test_control_a_slow_import_is_noticed():
    found = imported_by("import gritlm.models.text, pandas")
    assert found.intersection(SLOW_TO_IMPORT)


def test_texts_and_contracts_need_neither_torch_nor_transformers():
    found = imported_by("import gritlm.models.text")
    assert "gritlm" in found
    assert not found.intersection(("torch", "transformers", "numpy"))
