import shutil

import numpy as np
import pytest

from gritlm.evaluation.vector_cache import KEY, PARTS, VectorCache

RNG = np.random.default_rng(0)


def some(count: int) -> tuple[list[bytes], np.ndarray]:
    return [RNG.bytes(KEY) for _ in range(count)], RNG.standard_normal((count, 6)).astype(np.float32)


def found(cache: VectorCache, keys: list[bytes]) -> tuple[list[int], np.ndarray]:
    vectors = np.zeros((len(keys), 6), np.float32)
    return cache.find(keys, vectors), vectors


def test_another_process_finds_what_two_have_added(tmp_path):
    first, second = VectorCache(tmp_path, 6, 10**6), VectorCache(tmp_path, 6, 10**6)
    keys, vectors = some(30)
    first.add(keys[:10], vectors[:10])
    second.add(keys[10:20], vectors[10:20])
    first.add(keys[20:25], vectors[20:25])
    assert found(first, keys)[0] == [*range(10, 20), *range(25, 30)]
    missing, read = found(VectorCache(tmp_path, 6, 10**6), keys)
    assert missing == [25, 26, 27, 28, 29] and np.array_equal(read[:25], vectors[:25])


@pytest.mark.parametrize("what", ["keys", "vectors"])
def test_a_torn_write_gives_no_vector(tmp_path, what):
    keys, vectors = some(4)
    VectorCache(tmp_path, 6, 10**6).add(keys, vectors)
    assert found(VectorCache(tmp_path, 6, 10**6), keys)[0] == [], "control: whole files are read"
    file = next(tmp_path.glob(f"*.{what}"))
    file.write_bytes(file.read_bytes()[:-7])
    missing, read = found(VectorCache(tmp_path, 6, 10**6), keys)
    assert missing == ([3] if what == "keys" else [0, 1, 2, 3])
    good = [row for row in range(4) if row not in missing]
    assert np.array_equal(read[good], vectors[good])


def test_the_oldest_are_removed_beyond_the_limit(tmp_path):
    limit = 80 * 6 * 4
    cache = VectorCache(tmp_path, 6, limit)
    keys, vectors = some(200)
    for start in range(0, 200, 5):
        cache.add(keys[start : start + 5], vectors[start : start + 5])
    missing, read = found(cache, keys)
    assert missing == list(range(120)) and np.array_equal(read[120:], vectors[120:])
    assert len(list(tmp_path.glob("*.vectors"))) == PARTS
    assert sum(file.stat().st_size for file in tmp_path.glob("*.vectors")) <= limit
    assert found(VectorCache(tmp_path, 6, limit), keys)[0] == missing


def test_an_error_of_the_disk_ends_writing_and_not_the_run(tmp_path):
    cache = VectorCache(tmp_path / "vectors", 6, 10**6)
    keys, vectors = some(2)
    cache.add(keys[:1], vectors[:1])
    shutil.rmtree(tmp_path / "vectors")
    cache.add(keys[1:], vectors[1:])
    assert "vectors" in cache.problem and "No such file" in cache.problem
    assert found(cache, keys)[0] == [1]
