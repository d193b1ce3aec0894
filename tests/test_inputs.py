from __future__ import annotations

import inspect
import io
import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbcap.errors import InputError, UsageError
from dbcap.inputs import Found, Source, as_path, discover, shown


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str | bytes) -> None:
    for name in names:
        path = Path(os.fsdecode(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(found: Found) -> list[str]:
    assert [source.name for source in found.sources if source.error] == []
    return [source.name for source in found.sources]


def failure(source: Source) -> InputError:
    assert source.error is not None, f"{source.name} did not fail"
    return source.error


def listed(data: bytes, *, null: bool = False, recursive: bool = False) -> Found:
    return discover(["-"], null=null, recursive=recursive, stdin=io.BytesIO(data))


# --- named files --------------------------------------------------------------------------------------------


def test_files_keep_their_order_and_spelling(here: Path) -> None:
    touch("b.jpg", "a.jpg", "notes.txt")
    found = discover(["./b.jpg", "notes.txt", "a.jpg", str(here / "a.jpg")])
    assert found.sources == [Source("./b.jpg"), Source("notes.txt"), Source("a.jpg")]
    assert found.ignored == 0
    assert found.empty == []


@pytest.mark.parametrize(
    "name",
    [
        "[a].jpg",
        "*.jpg",
        "@x",
        "http:x",
        "http://host/a.jpg",
        "a b\tc\nd\r.jpg",
        " lead.jpg",
        b"caf\xe9.jpg",
        "~",
        "é.jpg",
    ],
)
def test_an_existing_file_is_that_file_whatever_its_name(here: Path, name: str | bytes) -> None:
    touch(name, "a.jpg", "b.jpg")
    argument = os.fsdecode(name)
    found = discover([argument])
    assert found.sources == [Source(argument)]
    assert found.single
    assert as_path(found.sources[0]).read_bytes() == b"x"
    assert os.fsencode(found.sources[0].name) == os.fsencode(name)


def test_an_existing_folder_is_that_folder_whatever_its_name(here: Path) -> None:
    touch("@x/a.jpg", "[b]/b.jpg", "b/no.jpg")
    assert names(discover(["@x", "[b]"])) == ["@x/a.jpg", "[b]/b.jpg"]


def test_a_minus_is_stdin_even_where_such_a_file_is(here: Path) -> None:
    touch("-", "a.jpg")
    assert names(listed(b"a.jpg\n")) == ["a.jpg"]
    assert names(discover(["./-"])) == ["./-"]


@pytest.mark.parametrize("name", ["no.jpg", "no/such.jpg", "", "no\nsuch.jpg", "a.jpg/", "x" * 5000, "nul\0.jpg"])
def test_a_missing_file_fails_in_its_place(here: Path, name: str) -> None:
    touch("a.jpg", "z.jpg")
    found = discover(["z.jpg", name, "a.jpg"])
    assert [source.name for source in found.sources] == ["z.jpg", name, "a.jpg"]
    error = failure(found.sources[1])
    assert error.kind == "missing"
    assert "\n" not in error.message
    assert discover([name]).single


def test_a_dangling_link_is_a_missing_file(here: Path) -> None:
    Path("link.jpg").symlink_to("nowhere.jpg")
    Path("self.jpg").symlink_to("self.jpg")
    found = discover(["link.jpg", "self.jpg", "link*.jpg"])
    assert [failure(source).kind for source in found.sources] == ["missing", "missing"]
    assert "link" in failure(found.sources[0]).message


def test_a_file_in_a_closed_folder_is_unreadable_not_missing(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    real = os.stat

    def closed(path: str, *args: object, **more: object) -> os.stat_result:
        if str(path).startswith("closed/"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", closed)
    error = failure(discover(["closed/a.jpg"]).sources[0])
    assert error.kind == "unreadable"
    assert "Permission denied" in error.message


def test_the_home_folder_is_left_to_the_shell(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("home/a.jpg")
    monkeypatch.setenv("HOME", str(here / "home"))
    assert failure(discover(["~/a.jpg"]).sources[0]).kind == "missing"


def test_a_pipe_that_is_named_is_taken(here: Path) -> None:
    os.mkfifo("pipe")
    assert names(discover(["pipe"])) == ["pipe"]


# --- each path once -----------------------------------------------------------------------------------------


def test_each_path_once_by_its_lexical_path(here: Path) -> None:
    touch("d/a.jpg", "d/b.jpg")
    spellings = [
        "d/a.jpg",
        "./d//a.jpg",
        "d/./a.jpg",
        str(here / "d/a.jpg"),
        "d/../d/a.jpg",
        "/" + str(here / "d/a.jpg"),
    ]
    assert names(discover([*spellings, "d", "d/*.jpg"])) == ["d/a.jpg", "d/b.jpg"]


def test_links_are_not_resolved(here: Path) -> None:
    touch("d/a.jpg")
    Path("link.jpg").symlink_to("d/a.jpg")
    Path("linked").symlink_to("d")
    assert names(discover(["d/a.jpg", "link.jpg", "linked/a.jpg"])) == ["d/a.jpg", "link.jpg", "linked/a.jpg"]


def test_dots_after_a_link_do_not_merge_different_files(here: Path) -> None:
    touch("a.jpg", "far/away/d/x", "far/away/a.jpg")
    Path("link").symlink_to("far/away/d")
    assert names(discover(["a.jpg", "link/../a.jpg", "far/away/a.jpg"])) == ["a.jpg", "link/../a.jpg"]


def test_failures_and_urls_come_once(here: Path) -> None:
    found = discover(["no.jpg", "./no.jpg", "http://h/a", "http://h/a", "x*", "x*"])
    assert [source.name for source in found.sources] == ["no.jpg", "http://h/a", "x*"]


# --- URLs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://host/a.jpg", "HTTPS://host/a.jpg?b=[1]*", "https://host/%20#x"])
def test_urls(here: Path, url: str) -> None:
    found = discover([url])
    assert found == Found([Source(url, is_url=True)], 0, True, [])
    with pytest.raises(ValueError, match="no path"):
        as_path(found.sources[0])


@pytest.mark.parametrize("url", ["ftp://host/a.jpg", "file:///a.jpg", "s3://b/*.jpg", "C+.-1://x"])
def test_other_schemes_fail(here: Path, url: str) -> None:
    found = discover([url])
    assert failure(found.sources[0]).kind == "url"
    assert found.single


def test_a_scheme_without_slashes_is_a_path(here: Path) -> None:
    assert failure(discover(["http:a.jpg"]).sources[0]).kind == "missing"


# --- folders ------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_direct_pictures_sorted(here: Path) -> None:
    touch(
        "p/b.JPG",
        "p/a.png",
        "p/Z.jpeg",
        "p/e\u0301.jpg",
        "p/notes.txt",
        "p/clip.mp4",
        "p/sub/c.jpg",
        "p/.h.jpg",
        "p/._a.png",
    )
    Path("p/folder.jpg").mkdir()
    os.mkfifo("p/pipe.jpg")
    found = discover(["p"])
    expected = ["p/Z.jpeg", "p/a.png", "p/b.JPG", "p/e\u0301.jpg"]
    assert found.sources == [Source(name, root="p") for name in expected]
    assert found.ignored == 3  # the text, the film and the pipe; nothing that is hidden
    assert not found.single
    assert found.empty == []


@pytest.mark.parametrize(
    ("argument", "name"), [(".", "./a.jpg"), ("./p", "./p/a.jpg"), ("p/", "p/a.jpg"), ("p/../p", "p/../p/a.jpg")]
)
def test_the_folder_is_spelt_as_given(here: Path, argument: str, name: str) -> None:
    touch("a.jpg", "p/a.jpg")
    assert discover([argument]).sources == [Source(name, root=argument)]


def test_recursion_sorts_by_path_components(here: Path) -> None:
    touch(
        "p/a.jpg", "p/a/b.jpg", "p/a/z/q.jpg", "p/a-b/c.jpg", "p/a/c.jpg", "p/.git/x.jpg", "p/b/.x/x.jpg", "p/b/n.txt"
    )
    found = discover(["p"], recursive=True)
    assert names(found) == ["p/a/b.jpg", "p/a/c.jpg", "p/a/z/q.jpg", "p/a-b/c.jpg", "p/a.jpg"]
    assert {source.root for source in found.sources} == {"p"}
    assert found.ignored == 1
    assert names(discover(["p/.git"])) == ["p/.git/x.jpg"]  # named, hidden or not


def test_awkward_names_survive_in_folders(here: Path) -> None:
    raw = [b"\xff\xfe.jpg", b"a b.jpg", b"new\nline.jpg", b"tab\t.jpg", "ü.jpg".encode()]
    touch(*(b"p/\xe9/" + name for name in raw))
    assert sorted(os.fsencode(name) for name in names(discover(["p"], recursive=True))) == sorted(
        b"p/\xe9/" + name for name in raw
    )


def test_link_loops_end(here: Path) -> None:
    touch("p/a.jpg", "p/s/b.jpg")
    Path("p/s/up").symlink_to("..")
    Path("p/s/me").symlink_to(".")
    Path("p/s/self").symlink_to("self")
    Path("p/t").symlink_to("s")
    # Another name for a folder gives other paths; only a folder inside itself is left out.
    assert names(discover(["p"], recursive=True)) == ["p/a.jpg", "p/s/b.jpg", "p/t/b.jpg"]
    assert names(discover(["p/**/*.jpg"])) == ["p/a.jpg", "p/s/b.jpg", "p/t/b.jpg"]


def test_a_dangling_link_in_a_folder_fails_if_it_looks_like_a_picture(here: Path) -> None:
    touch("p/b.jpg")
    Path("p/a.jpg").symlink_to("nowhere")
    Path("p/c.txt").symlink_to("nowhere")
    found = discover(["p"])
    assert [source.name for source in found.sources] == ["p/a.jpg", "p/b.jpg"]
    assert failure(found.sources[0]).kind == "missing"
    assert found.sources[0].root == "p"
    assert found.ignored == 1


def test_folders_that_overlap_are_walked_once(here: Path) -> None:
    touch("p/s/a.jpg", "p/s/n.txt", "p/z.jpg")
    found = discover(["p/s", "p", "p", "./p/s/"], recursive=True)
    assert found.sources == [Source("p/s/a.jpg", root="p/s"), Source("p/z.jpg", root="p")]
    assert found.ignored == 1
    assert discover(["p/s", "p/s/.."], recursive=True).empty == []


def test_empty_folders_are_named(here: Path) -> None:
    touch("t/n.txt", "p/s/a.jpg", "q/s/a.jpg")
    Path("e").mkdir()
    found = discover(["e", "t", "p", "e", "q/s", "q/s"])
    assert found.empty == ["e", "t", "p"]
    assert found.ignored == 1
    assert names(found) == ["q/s/a.jpg"]
    assert discover(["q/s", "q"], recursive=True).empty == []  # its only picture was there already


def test_an_unreadable_folder_fails(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("p/a/a.jpg", "p/b/b.jpg", "p/c.jpg")
    real = os.scandir

    def closed(path: str) -> object:
        if path.rstrip("/").endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    found = discover(["p"], recursive=True)
    assert [source.name for source in found.sources] == ["p/a/a.jpg", "p/b", "p/c.jpg"]
    error = failure(found.sources[1])
    assert error.kind == "unreadable"
    assert "Permission denied" in error.message
    alone = discover(["p/b", "p/b"])
    assert [failure(source).kind for source in alone.sources] == ["unreadable"]
    assert alone.empty == []
    assert names(discover(["p/*/*.jpg"])) == ["p/a/a.jpg"]  # as the shell does it


def test_a_deep_tree_needs_no_deep_stack(here: Path) -> None:
    deep = "p/" + "d/" * 200 + "a.jpg"
    touch(deep)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        found, globbed = discover(["p"], recursive=True), discover(["p/**/*.jpg"])
    finally:
        sys.setrecursionlimit(limit)
    assert names(found) == names(globbed) == [deep]


# --- globs --------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(here: Path) -> Path:
    touch(
        "a.jpg", "b.jpg", "b.txt", ".h.jpg", "d/a.jpg", "d/.h/x.jpg", "d/e/a.jpg", "d/e/n.txt", "d.x/a.jpg", "d-/q.jpg"
    )
    return here


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg", "b.jpg"]),
        ("[!a].[jt]*", ["b.jpg", "b.txt"]),
        (".*.jpg", [".h.jpg"]),
        ("d*/a.jpg", ["d/a.jpg", "d.x/a.jpg"]),
        ("d//*.jpg", ["d/a.jpg"]),
        ("*/e/*", ["d/e/a.jpg", "d/e/n.txt"]),
        ("d/.*/*.jpg", ["d/.h/x.jpg"]),
        ("**/a.jpg", ["a.jpg", "d/a.jpg", "d/e/a.jpg", "d.x/a.jpg"]),
        ("d/**/*.jpg", ["d/a.jpg", "d/e/a.jpg"]),
        ("d/**/**/e/**/a.*", ["d/e/a.jpg"]),
        ("d.x/**", ["d.x/a.jpg"]),
    ],
)
def test_globs(tree: Path, pattern: str, expected: list[str]) -> None:
    found = discover([pattern])
    assert names(found) == expected
    assert not found.single
    assert names(discover([f"{tree}/{pattern}"])) == [f"{tree}/{name}" for name in expected]
    assert names(discover([f"./{pattern}"])) == [f"./{name}" for name in expected]


def test_a_folder_that_matches_is_expanded_as_an_argument(tree: Path) -> None:
    found = discover(["d*"])
    assert found.sources == [
        Source("d/a.jpg", root="d"),
        Source("d-/q.jpg", root="d-"),
        Source("d.x/a.jpg", root="d.x"),
    ]
    assert names(discover(["d"], recursive=True)) == ["d/a.jpg", "d/e/a.jpg"]
    assert names(discover(["?/"], recursive=True)) == ["d/a.jpg", "d/e/a.jpg"]


def test_a_named_match_is_tried_even_if_it_is_no_picture(tree: Path) -> None:
    found = discover(["d/**"])
    assert sorted(names(found)) == ["d/a.jpg", "d/e/a.jpg", "d/e/n.txt"]


@pytest.mark.parametrize("pattern", ["*.gif", "no/*/x", "[z]", "d/**/zz", "[a.jpg", "a.jpg/*", "*.jpg/"])
def test_a_glob_that_matches_nothing_fails(tree: Path, pattern: str) -> None:
    found = discover([pattern, "a.jpg"])
    assert [source.name for source in found.sources] == [pattern, "a.jpg"]
    assert failure(found.sources[0]).kind == "missing"
    assert pattern in failure(found.sources[0]).message
    assert not discover([pattern]).single


def test_bytes_that_are_no_utf8_survive_globs(here: Path) -> None:
    touch(b"d\xe9/a\xff\n.jpg", b"d\xe9/b.jpg")
    assert [os.fsencode(name) for name in names(discover(["d*/?*.jpg"]))] == [b"d\xe9/a\xff\n.jpg", b"d\xe9/b.jpg"]


# --- lists --------------------------------------------------------------------------------------------------


def test_lists_keep_their_order(here: Path) -> None:
    touch("c.jpg", "a.jpg", "b.jpg", "z.jpg")
    Path("l.txt").write_bytes(b"c.jpg\nb.jpg\n")
    found = discover(["z.jpg", "@l.txt", "-"], stdin=io.BytesIO(b"a.jpg\nc.jpg"))
    assert names(found) == ["z.jpg", "c.jpg", "b.jpg", "a.jpg"]
    assert not discover(["@l.txt"]).single


def test_byte_order_mark_and_windows_line_ends(here: Path) -> None:
    touch("a b.jpg", "é.jpg")
    Path("l.txt").write_bytes("\ufeffa b.jpg\r\n\r\né.jpg\r\n".encode())
    assert names(discover(["@l.txt"])) == ["a b.jpg", "é.jpg"]


def test_a_return_that_belongs_to_the_name_stays(here: Path) -> None:
    touch("a.jpg\r", "b.jpg")
    assert names(listed(b"a.jpg\r\nb.jpg\r\n")) == ["a.jpg\r", "b.jpg"]


def test_lines_are_literal(here: Path) -> None:
    touch("a.jpg", "l.txt", " s .jpg", "*.jpg", "-", "[x]/i.jpg")
    found = listed(b"*.jpg\n@l.txt\n s .jpg\n-\n?.jpg\nhttp://h/x\nftp://h/x\n[x]\n")
    assert [(source.name, source.error and source.error.kind) for source in found.sources] == [
        ("*.jpg", None),
        ("@l.txt", "missing"),
        (" s .jpg", None),
        ("-", None),
        ("?.jpg", "missing"),
        ("http://h/x", None),
        ("ftp://h/x", "url"),
        ("[x]/i.jpg", None),
    ]
    assert found.sources[5].is_url


def test_null_ends_names_with_newlines(here: Path) -> None:
    raw = [b"a\nb.jpg", b"c\r", b"\xff.jpg", b" "]
    touch(*raw)
    assert [os.fsencode(name) for name in names(listed(b"\0".join([*raw, b"", b""]), null=True))] == raw
    Path("l").write_bytes(b"\0".join(raw))
    assert [os.fsencode(name) for name in names(discover(["@l"], null=True))] == raw


def test_nul_without_the_option_is_said(here: Path) -> None:
    with pytest.raises(UsageError, match=r"NUL.*-0"):
        listed(b"a.jpg\0b.jpg\0")
    Path("utf16.txt").write_text("a.jpg\n", encoding="utf-16")
    with pytest.raises(UsageError, match=r"utf16\.txt.*UTF-8"):
        discover(["@utf16.txt"])


def test_a_folder_in_a_list_is_expanded(here: Path) -> None:
    touch("p/b.jpg", "p/a.jpg", "p/s/c.jpg")
    assert listed(b"p\n").sources == [Source("p/a.jpg", root="p"), Source("p/b.jpg", root="p")]
    assert names(listed(b"p\n", recursive=True)) == ["p/a.jpg", "p/b.jpg", "p/s/c.jpg"]


def test_empty_lists_are_named(here: Path) -> None:
    Path("l.txt").write_bytes(b"\n\r\n")
    Path("e").mkdir()
    found = discover(["@l.txt", "-"], stdin=io.BytesIO(b""))
    assert found == Found([], 0, False, ["@l.txt", "-"])
    assert listed(b"e\n").empty == ["e"]


@pytest.mark.parametrize("argument", ["@no.txt", "@", "@folder"])
def test_a_list_that_cannot_be_read_is_wrong_usage(here: Path, argument: str) -> None:
    Path("folder").mkdir()
    with pytest.raises(UsageError, match=argument[1:] or "no name"):
        discover(["a.jpg", argument])


def test_stdin_can_be_used_once(here: Path) -> None:
    with pytest.raises(UsageError, match="more than once"):
        discover(["-", "a.jpg", "-"], stdin=io.BytesIO(b"a"))


def test_no_stdin(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UsageError, match="stdin"):
        discover(["-"])


# --- the rest -----------------------------------------------------------------------------------------------


def test_no_arguments() -> None:
    assert discover([]) == Found([], 0, False, [])


def test_two_files_are_not_single(here: Path) -> None:
    touch("a.jpg")
    assert not discover(["a.jpg", "a.jpg"]).single


def test_shown_escapes_controls_only() -> None:
    assert shown("a\tb\nc\rd\x00\x1b\x7f\x85e\\t é\udcff") == "a\\tb\\nc\\rd\\x00\\x1b\\x7f\\x85e\\t é\udcff"


@given(st.text(st.characters(exclude_categories=[])))
def test_shown_is_one_field_of_one_line(text: str) -> None:
    line = shown(text)
    assert not set(line) & {"\t", "\n", "\r", "\v", "\f", "\x1b", "\x85"}
    assert shown(line) == line


def test_many_files_are_found_fast(here: Path) -> None:
    Path("p").mkdir()
    for number in range(20_000):
        os.close(os.open(f"p/{number}.jpg", os.O_CREAT))
    begin = time.perf_counter()
    found = discover(["p", "p/*.jpg"])
    assert time.perf_counter() - begin < 5
    assert len(found.sources) == 20_000
    assert not hasattr(found.sources[0], "__dict__")
