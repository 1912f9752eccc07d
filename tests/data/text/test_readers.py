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


@pytest.mark.parametrize("bad", ["{not json", "[1]", '{"text": 3}', "\xff"])
def test_a_bad_jsonl_line_names_file_and_line(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + bad.encode("latin-1") + b"\n")
    with pytest.raises(SettingError, match=r"d\.jsonl.*line 2"):
        check_paths([str(path)])


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
