"""Run tasks of mteb, here or shared out over processes, one a device. Results are stored as mteb stores them.

A task that fails is an outcome; the others go on. What is stored is not measured again.
"""

import errno
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gritlm.errors import UserError, first_line, one_line
from gritlm.evaluation.benchmarks import import_mteb, quiet_mteb
from gritlm.evaluation.mteb_model import Job, load
from gritlm.models.hub import ask

# Parts of the names of the errors of datasets, huggingface_hub, requests and httpx without a network.
NETWORK = ("Offline", "Connect", "LocalEntryNotFound", "DatasetNotFound", "Timeout", "MaxRetry", "HfHubHTTPError")


@dataclass
class Outcome:
    """What became of a task: its main score, or why it has none."""

    task: str
    score: float | None = None
    metric: str = ""
    seconds: float = 0.0
    why: str = ""
    disk_full: bool = False


def run_tasks(job: Job, tasks: Sequence[Any], processes: int | None = None) -> list[Outcome]:
    """Run tasks, the longest first. Prints a line for each.

    Args:
        processes: how many work, each on a device of its own if there are as many. None is one for each GPU.
    Raises:
        UserError: the model does not load.
    """
    reason = ask(tasks[0].metadata.dataset["path"], "dataset")
    offline = reason != "" and "has no such" not in reason
    if offline:
        print(f"no network ({reason}): only data in the cache is used", flush=True)
    gpus = torch.cuda.device_count()
    processes = min(processes or max(gpus, 1), len(tasks))
    waiting = sorted(tasks, key=_length)
    outcomes: dict[str, Outcome] = {}
    lock, disk_full = threading.Lock(), threading.Event()

    def work(run: Callable[[Any], Outcome]) -> None:
        while True:
            with lock:
                if not waiting:
                    return
                task = waiting.pop()
            name = task.metadata.name
            told = Outcome(name, why="not run, because the disk is full") if disk_full.is_set() else run(task)
            with lock:
                outcomes[name] = told
                score = f"failed: {told.why}" if told.score is None else f"{told.metric} {told.score:.4f}"
                print(f"[{len(outcomes)}/{len(tasks)}] {name}: {score} ({told.seconds:.0f} s)", flush=True)
            if told.disk_full:
                disk_full.set()

    if processes == 1:
        if offline:
            _go_offline()
        model = load(job, None)
        work(lambda task: run_task(job, model, task))
    else:
        job = replace(job, cache_bytes=job.cache_bytes // processes)
        workers = [_Worker(job, f"cuda:{i % gpus}" if gpus else "cpu", offline) for i in range(processes)]
        threads = [threading.Thread(target=work, args=[worker.run], daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for worker in workers:
            worker.close()
    if all(outcome.score is not None for outcome in outcomes.values()):
        shutil.rmtree(job.vectors, ignore_errors=True)
        with suppress(OSError):  # another model's are in it, or there were none
            job.vectors.parent.rmdir()
    return [outcomes[task.metadata.name] for task in tasks]


def _go_offline() -> None:
    """As if HF_HUB_OFFLINE were set from the start. Otherwise each task waits half a minute for the network."""
    import datasets
    import huggingface_hub

    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True


def _length(task: Any) -> int:
    """The characters of a task's texts, as mteb counted them; 0 where it has not."""

    def total(found: Any) -> int:
        if not isinstance(found, dict):
            return 0
        own = found.get("number_of_characters") or found.get("total_text_length")
        return own or sum(total(value) for key, value in found.items() if key != "hf_subset_descriptive_stats")

    return total(task.metadata.descriptive_stats)


def run_task(job: Job, model: Any, task: Any) -> Outcome:
    """Measure what is not stored of a task."""
    started, name = time.monotonic(), task.metadata.name
    try:
        with quiet_mteb():
            result = import_mteb().evaluate(
                model,
                task,
                co2_tracker=False,
                encode_kwargs={"batch_size": 32, "show_progress_bar": False},
                cache=result_cache(job.folder),
                overwrite_strategy="always" if job.overwrite else "only-missing",
                show_progress_bar=False,
                public_only=False,
            )
            score = float(result.task_results[0].validate_and_filter_scores(task).get_score())
        if score != score:
            raise UserError("found no score, or none for some of its subsets")
        return Outcome(name, score, task.metadata.main_score, time.monotonic() - started)
    except Exception as error:  # of mteb, a task's own loading, the network, memory, the disk
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        return Outcome(name, seconds=time.monotonic() - started, why=why_failed(error, task), disk_full=full)
    finally:
        if task.data_loaded:
            task.unload_data()


def why_failed(error: BaseException, task: Any) -> str:
    """Why a task has no score, in one line."""
    if isinstance(error, UserError):
        return str(error)
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 10:
        chain.append(cause)
    if any(word in type(cause).__name__ for cause in chain for word in NETWORK):
        data = task.metadata.dataset["path"]
        return f"its data {data} is not in the cache and cannot be fetched: {one_line(error)[:200]}"
    return f"{type(error).__name__}: {one_line(error)[:300]}"


class _Worker:
    """A process on a device that runs one task after the other. It is started again if a task ends it."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments  # of `_serve`
        self.process: Any = None

    def run(self, task: Any) -> Outcome:
        started = time.monotonic()
        if self.process is None:
            context = multiprocessing.get_context("forkserver")  # CUDA does not survive a fork of this process
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs, *self.arguments), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.connection.send(task)
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            why, self.process = f"its process ended with exit code {self.process.exitcode}", None
            return Outcome(task.metadata.name, seconds=time.monotonic() - started, why=why)

    def close(self) -> None:
        if self.process is not None:
            self.connection.send(None)
            self.process.join()


def _serve(connection: Any, job: Job, device: str, offline: bool) -> None:
    if offline:
        _go_offline()
    model: Any = None
    while task := connection.recv():
        try:
            model = model or load(job, device)
            told = run_task(job, model, task)
        except Exception as error:
            told = Outcome(task.metadata.name, why=one_line(error))
        connection.send(told)


def result_cache(folder: Path) -> Any:
    """An mteb.ResultCache whose files are whole or absent. A damaged file counts as absent."""
    from huggingface_hub.utils import WeakFileLock
    from mteb import ResultCache

    class WholeFiles(ResultCache):
        def save_to_cache(self, task_result: Any, model_name: Any, model_revision: Any = None, **options: Any) -> None:
            target = self.get_task_result_path(task_result.task_name, model_name, model_revision).parent
            target.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(self.cache_path / ".lock"), tempfile.TemporaryDirectory(dir=target) as aside:
                staged = Path(aside) / target.relative_to(self.cache_path)
                staged.mkdir(parents=True)
                for settings in target.glob("run_settings.jsonl"):  # mteb adds to it
                    shutil.copy(settings, staged)
                ResultCache(aside).save_to_cache(task_result, model_name, model_revision, **options)
                for file in staged.iterdir():
                    file.replace(target / file.name)

        def load_task_result(self, task_name: str, *args: Any, **options: Any) -> Any:
            try:
                return super().load_task_result(task_name, *args, **options)
            except (ValueError, KeyError) as error:
                print(f"{task_name}: its stored result is damaged ({first_line(error)}); measured again", flush=True)
                return None

    return WholeFiles(folder)
