from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lightning_fot.data.text.parts import DocumentSource, Found
from lightning_fot.data.text.readers import check_paths, find_documents, standard_library
from lightning_fot.errors import SettingError


def texts(found: Found) -> dict[str, str]:
    return {source.name: "".join(source.pieces()) for source in found.documents}


def test_text_files_are_documents_and_code_of_a_folder_is_one(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    (root / "src").mkdir(parents=True)
    (root / "book.txt").write_text("A book.")
    (root / "notes.md").write_text("Notes.")
    (root / "src" / "b.py").write_text("b = 2\n")
    (root / "src" / "a.c").write_text("int a;\n")
    (root / "src" / "README.md").write_text("Read me.")
    assert texts(find_documents([str(root)])) == {
        "mine/book.txt": "A book.",
        "mine/notes.md": "Notes.",
        "mine/src/README.md": "Read me.",
        "mine/src": "# file: mine/src/a.c\nint a;\n\n# file: mine/src/b.py\nb = 2\n",
    }


def test_a_file_given_by_name_is_one_document_and_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text("x = 1\n")
    assert texts(find_documents([str(path), str(path), str(tmp_path)])) == {"one.py": "x = 1\n"}


def test_hidden_version_control_and_cache_folders_are_left_out(tmp_path: Path) -> None:
    for folder in (".git", "node_modules", "__pycache__", ".venv"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("no")
    (tmp_path / ".secret.txt").write_text("no")
    (tmp_path / "seen.txt").write_text("yes")
    assert list(texts(find_documents([str(tmp_path)])).values()) == ["yes"]


def test_encodings(tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfwith mark")
    (tmp_path / "utf16.txt").write_bytes("wide ü".encode("utf-16"))
    (tmp_path / "nul.txt").write_bytes(b"abc\0def")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b" \n")
    found = find_documents([str(tmp_path)])
    assert sorted(texts(found).values()) == ["wide ü", "with mark"]
    assert found.skipped == Counter({"binary or not UTF-8": 2, "empty": 1})
    assert found.skipped_text() == "2 binary or not UTF-8, 1 empty"


WIDE = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")


def _wide(text: str, encoding: str) -> bytes:
    mark = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
    return (mark + text).encode(encoding)


@pytest.mark.parametrize("encoding", WIDE)
def test_wide_encodings_with_their_mark_are_read_as_text_and_as_lines(tmp_path: Path, encoding: str) -> None:
    # Letters with a byte of a line feed in them, on either side.
    text = "wide ü, \u0a0a\u0a00\u000b\u0a41 and 𝄞"
    (tmp_path / "a.txt").write_bytes(_wide(text, encoding))
    (tmp_path / "blank.txt").write_bytes(_wide(" \n", encoding))
    lines = [json.dumps({"text": f"{text} {number}"}, ensure_ascii=False) for number in range(3)]
    (tmp_path / "b.jsonl").write_bytes(_wide("\r\n\r\n".join(lines), encoding))
    found = find_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), str(tmp_path)])
    assert texts(found) == {"a.txt": text, **{f"b.jsonl:{1 + 2 * n}": f"{text} {n}" for n in range(3)}}
    assert found.skipped == Counter({"empty": 1})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", *WIDE])
@pytest.mark.parametrize("before", [10, 70_000, 200_000])
def test_a_nul_anywhere_makes_a_file_binary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, before: int
) -> None:
    monkeypatch.setattr("lightning_fot.data.text.parts.BLOCK_BYTES", 100_000)
    (tmp_path / "late.txt").write_bytes(_wide("a" * before + "\0 b", encoding))
    (tmp_path / "good.txt").write_text("good")
    found = find_documents([str(tmp_path)])
    # What is found only when it is read leaves nothing of the text behind.
    assert ["".join(source.pieces(found.skipped)) for source in found.documents if source.name[-8:] != "good.txt"] in (
        [],
        [""],
    )
    assert found.skipped == Counter({"binary or not UTF-8": 1})
    assert "late.txt" in found.skipped_text(named=True)


def test_text_after_much_white_space_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n" * 70_000 + "late", encoding="utf-8")
    assert "".join(find_documents([str(tmp_path)]).documents[0].pieces()).strip() == "late"


def test_names_that_are_no_text_are_written_out(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/f\xff"
    os.mkdir(folder)
    for name in (b"caf\xe9.txt", b"caf\xe8.txt", b"x.py"):
        Path(os.fsdecode(folder + b"/" + name)).write_text("text")
    found = find_documents([os.fsdecode(folder)])
    assert texts(found) == {
        "f\\xff/caf\\xe8.txt": "text",
        "f\\xff/caf\\xe9.txt": "text",
        "f\\xff": "# file: f\\xff/x.py\ntext",
    }


def test_names_that_differ_stay_different(tmp_path: Path) -> None:
    """A byte that is no UTF-8 is written out as another file may be called; a line is named as another file may be."""
    folder = os.fsencode(tmp_path)
    names = [b"\xff.txt", b"\\xff.txt", b"\\\xff.txt", b"\\\\xff.txt", b"a.jsonl", b"a.jsonl:1", b"a.NDJSON:12"]
    for number, name in enumerate(names):
        content = f"text {number}"
        Path(os.fsdecode(folder + b"/" + name)).write_text(
            f'{{"text": "{content}"}}' if name == b"a.jsonl" else content
        )
    for given in ([str(tmp_path)], [os.fsdecode(folder + b"/" + name) for name in names]):
        documents = find_documents(given).documents
        assert len({source.place for source in documents}) == len(documents) == len(names)
        assert {source.name.rpartition("/")[2] for source in documents} >= {"\\xff.txt", "\\\\xff.txt"}


def test_a_character_across_the_end_of_the_looked_at_part_is_no_error(tmp_path: Path) -> None:
    text = "a" * (64 * 1024 - 1) + "é and more"
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    assert list(texts(find_documents([str(tmp_path)])).values()) == [text]


def test_a_file_found_binary_only_when_read_is_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_bytes(b"a" * (70 * 1024) + b"\xff")
    (tmp_path / "good.py").write_text("x = 1\n")
    (source,) = find_documents([str(tmp_path)]).documents
    skipped: Counter[str] = Counter()
    assert "x = 1" in "".join(source.pieces(skipped))
    assert skipped == Counter({"binary or not UTF-8": 1})


def test_blocks_of_a_large_file_are_read_only_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fot.data.text.parts.BLOCK_BYTES", 3)
    text = "aé" * 10 + "b"
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    (source,) = find_documents([str(tmp_path)]).documents
    pieces = list(source.pieces())
    assert len(pieces) > 5
    assert "".join(pieces) == text


def test_links_in_a_circle_end_and_a_linked_file_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("once")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "again.txt").symlink_to(tmp_path / "a" / "x.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert list(texts(find_documents([str(tmp_path)])).values()) == ["once"]


def test_jsonl_lines_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    lines = [{"text": "first ü"}, {"text": " "}, {"text": "third\nline"}]
    path.write_text("\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    found = find_documents([str(path)])
    assert texts(found) == {"d.jsonl:1": "first ü", "d.jsonl:5": "third\nline"}
    assert found.skipped == Counter({"empty": 1})


def test_jsonl_field_is_configurable(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"body": "b", "id": 1}\n')
    assert texts(find_documents([str(path)], text_field="body")) == {"d.jsonl:1": "b"}
    with pytest.raises(
        SettingError, match=r"line 1 has no text under the key 'text'; its keys are body, id.*text_field"
    ):
        find_documents([str(path)])


BAD_LINES = [
    "{not json",
    "[1]",
    '{"text": 3}',
    '{"text": null}',
    "\xff",
    '{"text": "cut \\ud83d here"}',
    '{"text": "a \\u0000 inside"}',
    '{"text": "deep", "tree": ' + "[" * 200_000 + "]" * 200_000 + "}",
    '{"text": "long", "number": ' + "1" * 5000 + "}",
]


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_jsonl_line_names_file_and_line(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + bad.encode("latin-1") + b'\n{"text": "later"}\n')
    with pytest.raises(SettingError, match=r"d\.jsonl.*line 2"):
        check_paths([str(path)])
    found = find_documents([str(path)], setting="PATH", lenient=True)
    assert texts(found) == {"d.jsonl:1": "good", "d.jsonl:3": "later"}
    assert found.skipped.total() == 1
    assert "d.jsonl:2" in found.skipped_text(named=True)


def test_a_line_without_text_is_told_by_what_can_be_set(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"body": "b"}\n')
    with pytest.raises(SettingError, match=r"Set data\.text_field"):
        find_documents([str(path)])
    with pytest.raises(SettingError) as refused:
        find_documents([str(path)], setting="PATH")
    assert "text_field" not in str(refused.value)


def test_a_line_that_changed_since_it_was_found_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    for later in ('{"note": "gone"}', "no json at all..", "[" * 200_000, '{"text": "\\ud83d"}'):
        path.write_text('{"text": "first"}\n')
        (source,) = find_documents([str(path)]).documents
        path.write_text(later)
        skipped: Counter[str] = Counter()
        assert "".join(source.pieces(skipped)) == ""
        assert skipped.total() == 1


def test_a_large_jsonl_is_read_only_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fot.data.text.readers.LARGE_FILE_BYTES", 10)
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n' * 3 + "never read")
    assert len(find_documents([str(path)], max_documents=2).documents) == 2


def test_errors_name_setting_value_and_fix(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"data\.paths='nowhere/x': does not exist"):
        check_paths(["nowhere/x"])
    with pytest.raises(SettingError, match="no file or folder"):
        check_paths([])
    with pytest.raises(SettingError, match=r"holds no text \(there are no files in it"):
        check_paths([str(tmp_path)])
    (tmp_path / "x.bin").write_bytes(b"\0")
    with pytest.raises(SettingError, match=r"holds no text \(1 binary"):
        check_paths([str(tmp_path)])
    (tmp_path / "y.txt").write_text("short")
    check_paths(str(tmp_path))
    with pytest.raises(SettingError, match=r"no document has 512 tokens .*longest has 5 bytes.*model\.memory\.window"):
        check_paths([str(tmp_path)], min_tokens=512)
    check_paths(None, min_tokens=10**9)


def test_what_is_no_file_is_an_error_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SettingError, match="neither a file nor a folder"):
        check_paths([str(tmp_path / "pipe")])


def test_standard_library_of_a_small_folder(tmp_path: Path) -> None:
    for name in ("alpha/__init__.py", "alpha/sub/deep.py", "alpha/test/test_x.py", "test/x.py", "site-packages/y.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "abc.py").write_text("a = 1\n")
    (tmp_path / "bbb.py").write_text("b = 1\n")
    (tmp_path / "long.py").write_text("x = 1\n" * 4000)
    (tmp_path / "token.py").write_text('"""Tokens."""\n# Auto-generated by Tools/build.py\n')
    found = standard_library(str(tmp_path))
    assert [source.name for source in found.documents] == ["abc.py … bbb.py", "alpha", "long.py"]
    content = texts(found)["alpha"]
    assert content.startswith("# file: alpha/__init__.py\n# alpha/__init__.py\n")
    assert "deep.py" in content
    assert "test" not in content
    assert found.skipped == Counter({"generated": 1})


def test_standard_library_of_this_interpreter() -> None:
    found = find_documents(None)
    names = [source.name for source in found.documents]
    assert {"asyncio", "json", "email"} <= set(names)
    assert not {"test", "site-packages", "token.py"} & set(names)
    assert all(isinstance(source, DocumentSource) and source.size > 0 for source in found.documents)
    assert names == [source.name for source in find_documents(None).documents]


def test_importing_and_checking_loads_no_torch() -> None:
    code = (
        "import sys, lightning_fot.data as d; d.check_paths([sys.argv[1]]); d.find_documents(None);"
        "assert not {'torch', 'numpy', 'lightning'} & set(sys.modules), 'too much is imported'"
    )
    subprocess.run([sys.executable, "-c", code, __file__], check=True)
