"""Tasks of mteb whose data is made here: no network. Imported only by the tests that use mteb."""

import os
import random
import signal
from typing import Any

from datasets import Dataset, DatasetDict
from helpers import words
from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata


def metadata(name: str, kind: str, main: str, **more: Any) -> TaskMetadata:
    unused = ("date", "domains", "task_subtypes", "license", "annotations_creators", "dialect", "sample_creation")
    given = {
        "name": name,
        "dataset": {"path": f"local/{name}", "revision": "1"},
        "description": name,
        "reference": None,
        "type": kind,
        "category": "t2t",
        "modalities": ["text"],
        "eval_splits": ["test"],
        "eval_langs": ["eng-Latn"],
        "main_score": main,
        "bibtex_citation": None,
    }
    return TaskMetadata(**dict.fromkeys(unused), **given | more)


class Retrieval(AbsTaskRetrieval):
    """Queries are the beginnings of passages; some passages have a title, some equal texts."""

    metadata = metadata("LocalRetrieval", "Retrieval", "ndcg_at_10")
    candidates = False

    def load_data(self, **options: Any) -> None:
        if self.data_loaded:
            return
        rng = random.Random(1)
        titles = [words(rng, 1, 3) if i % 3 else "" for i in range(60)]
        texts = [words(rng, 5, 25) + " " * (i % 2) for i in range(60)]
        texts[10:20] = texts[:10]
        corpus = [{"id": f"d{i}", "title": titles[i], "text": texts[i]} for i in range(60)]
        queries = [{"id": f"q{i}", "text": " ".join(texts[i].split()[:4])} for i in range(24)]
        grades = {f"q{i}": {f"d{i}": 2, f"d{(i * 7) % 60}": 1} for i in range(24)}
        top = {f"q{i}": rng.sample([f"d{j}" for j in range(60)], 10 + 2 * i) for i in range(24)}
        data = {"queries": Dataset.from_list(queries), "corpus": Dataset.from_list(corpus), "relevant_docs": grades}
        self.dataset = {"default": {"test": data | {"top_ranked": top if self.candidates else None}}}
        self.data_loaded = True


class Reranking(Retrieval):
    metadata = metadata("LocalReranking", "Reranking", "map_at_1000")
    candidates = True


class Sts(AbsTaskSTS):
    metadata = metadata("LocalSTS", "STS", "cosine_spearman")
    min_score, max_score = 0, 1

    def load_data(self, **options: Any) -> None:
        if self.data_loaded:
            return
        rng = random.Random(2)
        pairs = [(words(rng, 3, 9), words(rng, 3, 9), rng.random()) for _ in range(40)]
        columns = dict(zip(("sentence1", "sentence2", "score"), zip(*pairs, strict=True), strict=True))
        self.dataset = DatasetDict(test=Dataset.from_dict({name: list(value) for name, value in columns.items()}))
        self.data_loaded = True


class Classification(AbsTaskClassification):
    metadata = metadata("LocalClassification", "Classification", "accuracy")
    n_experiments = 2

    def load_data(self, **options: Any) -> None:
        if self.data_loaded:
            return
        rng = random.Random(3)
        kinds = [("river stone", "violet thread")[i % 2] for i in range(40)]
        rows = [{"text": f"{kind} {words(rng, 2, 6)}", "label": i % 2} for i, kind in enumerate(kinds)]
        self.dataset = DatasetDict(train=Dataset.from_list(rows[:20]), test=Dataset.from_list(rows[20:]))
        self.data_loaded = True


class Broken(Retrieval):
    """A task whose data cannot be loaded."""

    metadata = metadata("LocalBroken", "Retrieval", "ndcg_at_10")

    def load_data(self, **options: Any) -> None:
        raise RuntimeError("no such data\nsecond line")


class Deadly(Retrieval):
    """A task that ends its process, as the kernel does when memory is short."""

    metadata = metadata("LocalDeadly", "Retrieval", "ndcg_at_10")

    def load_data(self, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
