"""Models of other libraries, as `gritlm evaluate`, `encode` and `mine` load them."""

import numpy as np
from families import build_family
from sentence_transformers import SentenceTransformer

from gritlm.evaluation import models
from gritlm.models.cpu_linear import products_of, use_products

TEXTS = [f"{number} red cats see the house" + " and the sea" * (number % 7) for number in range(40)]


def test_a_model_of_sentence_transformers_has_our_products_and_its_own_vectors(tmp_path, monkeypatch):
    folder = build_family(tmp_path / "bert", "bert", hidden_size=96, intermediate_size=128)
    plain = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, normalize_embeddings=True)
    monkeypatch.setattr(models, "choose_products", lambda model, directions: (directions, ""))
    loaded = []

    def use(model, directions):
        use_products(model, directions)
        loaded.append(products_of(model))

    monkeypatch.setattr(models, "use_products", use)
    found = models.find_model(str(folder), None, None, None, tmp_path / "out")
    found.load()
    vectors = found.encode(TEXTS, "passage", None)
    assert loaded == [["forward"]]
    assert np.abs(vectors - plain).max() < 1e-6
    assert np.abs(vectors[::-1] - plain).max() > 1e-2, "control: texts have different vectors"
