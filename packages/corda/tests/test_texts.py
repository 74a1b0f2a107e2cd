import ast
import csv
import sys
import unicodedata
from pathlib import Path

import pytest
from corda.texts import standard_library_code, unicode_names

from tenfold import UserError


def test_code_is_that_of_the_modules_in_their_order():
    code = standard_library_code(["csv", "json.decoder"])
    names = {node.name for node in ast.parse(code.text).body if isinstance(node, ast.ClassDef)}
    assert {"DictReader", "JSONDecoder"} <= names
    assert code.text.startswith(Path(csv.__file__).read_text(encoding="utf-8"))
    assert "(csv, json.decoder; shipped with Python)" in code.source
    assert len(standard_library_code().text) > 100_000


@pytest.mark.parametrize("name", ["jsn", "numpy", "../secret", "math"])
def test_code_of_anything_but_one_file_of_the_standard_library_is_refused(name):
    with pytest.raises(UserError, match="no module of one Python file in the standard library"):
        standard_library_code([name])


def test_names_of_characters_are_facts():
    text = unicode_names(0x0410, 300)
    lines = text.text.splitlines()
    assert len(set(lines)) == 300
    for line in lines:
        code, _, name = line.partition(" -> ")
        assert ord(unicodedata.lookup(name)) == int(code.removeprefix("U+"), 16)
    assert "U+0416 -> CYRILLIC CAPITAL LETTER ZHE" in lines
    assert unicodedata.unidata_version in text.source


@pytest.mark.parametrize(("first", "count"), [(sys.maxunicode - 5, 1), (0, 0)])
def test_more_names_than_there_are_is_refused(first, count):
    with pytest.raises(UserError, match="count must be 1 to"):
        unicode_names(first, count)
