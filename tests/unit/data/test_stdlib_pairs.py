"""Pairs of a docstring's summary and its source code."""

from gritlm.data.stdlib_pairs import extract_pairs

SOURCE = '''
class Shelf:
    """A shelf that keeps books.

    More about it.
    """

    def add(self, book):
        """Put a book on the shelf."""
        self.books.append(book)

    def undocumented(self):
        return 1


def short():
    """Too short."""
    return 2


def empty():
    """A docstring and nothing else in it."""
'''


def test_a_pair_is_the_summary_and_the_code_without_docstrings(tmp_path):
    (tmp_path / "shelf.py").write_text(SOURCE)
    pairs = dict(extract_pairs(tmp_path / "shelf.py"))
    assert pairs.keys() == {"A shelf that keeps books.", "Put a book on the shelf."}
    assert pairs["Put a book on the shelf."] == "def add(self, book):\n    self.books.append(book)"
    code = pairs["A shelf that keeps books."]
    assert code.startswith("class Shelf:") and "def undocumented" in code
    assert "More about it" not in code and "Put a book" not in code


def test_a_file_that_is_not_python_gives_no_pairs(tmp_path):
    (tmp_path / "template.py").write_text('"""A template."""\ndef {{ name }}(): pass\n')
    assert extract_pairs(tmp_path / "template.py") == []
