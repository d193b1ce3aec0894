from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbcap.captioning.records import Existing
from dbcap.captioning.xmp import Xmp
from dbcap.errors import InputError, UsageError
from dbcap.inputs import Source
from dbcap.plugins.api import Candidate, Record

RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
DC = "{http://purl.org/dc/elements/1.1/}"
LANG = "{http://www.w3.org/XML/1998/namespace}lang"

RDF_NS = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
DC_NS = 'xmlns:dc="http://purl.org/dc/elements/1.1/"'
D_NS = DC_NS.replace(":dc", ":d")

FOREIGN = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<!-- kept -->
<x:xmpmeta xmlns:x="adobe:ns:meta/"  x:xmptk='Core 5.6'>
 <rdf:RDF {RDF_NS}>
  <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="3"
     xmlns:lr="urn:lr" lr:note="a > b, dc:description=&quot;no&quot;">
   <lr:deep><rdf:Description><d:description {D_NS}>not this</d:description></rdf:Description></lr:deep>
  </rdf:Description>
  <rdf:Description rdf:about="" {DC_NS}>
   <dc:title><rdf:Alt><rdf:li xml:lang="x-default">title</rdf:li></rdf:Alt></dc:title>
   <dc:description>
    <rdf:Alt>
     <rdf:li xml:lang="de">zwei &amp; Hunde</rdf:li>
     <!-- between -->
     <rdf:li xml:lang="X-Default" >OLD</rdf:li>
    </rdf:Alt>
   </dc:description>
   <?tool keep this?>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
{" " * 40}
<?xpacket end='w'?>"""


def wrap(inner: str, attributes: str = "") -> str:
    return f'<rdf:RDF {RDF_NS}><rdf:Description rdf:about=""{attributes}>{inner}</rdf:Description></rdf:RDF>'


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "a.jpg").write_bytes(b"image")
    return Source(str(tmp_path / "a.jpg"))


def put(source: Source, content: str | bytes) -> Path:
    path = Xmp().target(source)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write(source: Source, existing: Existing, *texts: str) -> bytes:
    placed = Xmp()
    captions = tuple(Candidate(text, 0.0) for text in texts)
    placed.check([source])
    placed.write(source, Record(source.name, "", 1, 1, captions, "m", 0), existing)
    placed.flush()
    return placed.target(source).read_bytes()


def texts(data: bytes) -> dict[str, str]:
    """Read the description with a parser that is not ours: language -> text."""
    root = ET.fromstring(data)
    rdf = root if root.tag == f"{RDF}RDF" else root.find(f"{RDF}RDF")
    assert rdf is not None
    found = {}
    for description in rdf.findall(f"{RDF}Description"):
        if f"{DC}description" in description.attrib:
            found["x-default"] = description.attrib[f"{DC}description"]
        for item in description.findall(f"{DC}description/*/{RDF}li"):
            found[item.get(LANG, "").lower()] = item.text or ""
    return found


def test_a_new_file(source: Source) -> None:
    assert not Xmp().has(source)
    assert write(source, "skip", "a <b> & c", "second") == (
        b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
        b' <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n'
        b'  <rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">\n'
        b'   <dc:description><rdf:Alt><rdf:li xml:lang="x-default">a &lt;b&gt; &amp; c</rdf:li></rdf:Alt>'
        b"</dc:description>\n"
        b"  </rdf:Description>\n </rdf:RDF>\n</x:xmpmeta>\n"
        b'<?xpacket end="w"?>\n'
    )
    assert Xmp().target(source).name == "a.xmp"
    assert Xmp().has(source)
    assert sorted(os.listdir(os.path.dirname(source.name))) == ["a.jpg", "a.xmp"]


@pytest.mark.parametrize("old", [b"", b" \n"])
def test_an_empty_file_is_none(source: Source, old: bytes) -> None:
    put(source, old)
    assert not Xmp().has(source)
    assert texts(write(source, "error", "new")) == {"x-default": "new"}


@pytest.mark.parametrize(
    ("existing", "text"),
    [("overwrite", "n&amp;w"), ("append", "OLD, n&amp;w"), ("prepend", "n&amp;w, OLD"), ("skip", "OLD")],
)
def test_all_but_the_default_text_stays_byte_for_byte(source: Source, existing: Existing, text: str) -> None:
    put(source, FOREIGN)
    assert Xmp().has(source)
    assert write(source, existing, "n&w") == FOREIGN.replace("OLD", text).encode()


def test_existing_error(source: Source) -> None:
    path = put(source, FOREIGN)
    with pytest.raises(InputError, match="has a caption") as caught:
        write(source, "error", "new")
    assert caught.value.kind == "exists"
    assert path.read_bytes() == FOREIGN.encode()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # No description: it comes last in the first rdf:Description, before the white space that indents its end.
        (
            wrap("\n <a:b xmlns:a='u'/>\n"),
            wrap(f"\n <a:b xmlns:a='u'/>\n   <dc:description {DC_NS}><rdf:Alt>NEW</rdf:Alt></dc:description>\n"),
        ),
        # The prefix is declared: no second declaration. It means something else: a declaration of our own.
        (wrap("", f" {DC_NS}"), wrap("\n   <dc:description><rdf:Alt>NEW</rdf:Alt></dc:description>", f" {DC_NS}")),
        (
            wrap("", ' xmlns:dc="urn:other"'),
            wrap(f"\n   <dc:description {DC_NS}><rdf:Alt>NEW</rdf:Alt></dc:description>", ' xmlns:dc="urn:other"'),
        ),
        # Elements without content are opened.
        (
            f"<r:RDF {RDF_NS.replace('rdf=', 'r=')}><r:Description r:about='' /></r:RDF>",
            f"<r:RDF {RDF_NS.replace('rdf=', 'r=')}><r:Description r:about=''>\n   <dc:description {DC_NS}>"
            f"<rdf:Alt {RDF_NS}>NEW</rdf:Alt></dc:description>\n  </r:Description></r:RDF>",
        ),
        (
            f"<rdf:RDF {RDF_NS}/>",
            f'<rdf:RDF {RDF_NS}>\n  <rdf:Description rdf:about="">\n   <dc:description {DC_NS}><rdf:Alt>NEW</rdf:Alt>'
            "</dc:description>\n  </rdf:Description>\n </rdf:RDF>",
        ),
        (
            wrap("<dc:description/>", f" {DC_NS}"),
            wrap("<dc:description><rdf:Alt>NEW</rdf:Alt></dc:description>", f" {DC_NS}"),
        ),
        # Languages, but no default: it comes first.
        (
            wrap('<dc:description><rdf:Alt><rdf:li xml:lang="de">D</rdf:li></rdf:Alt></dc:description>', f" {DC_NS}"),
            wrap(
                '<dc:description><rdf:Alt>NEW<rdf:li xml:lang="de">D</rdf:li></rdf:Alt></dc:description>', f" {DC_NS}"
            ),
        ),
        (
            wrap("<dc:description><rdf:Alt/></dc:description>", f" {DC_NS}"),
            wrap("<dc:description><rdf:Alt>NEW</rdf:Alt></dc:description>", f" {DC_NS}"),
        ),
        # An empty default.
        (
            wrap("<dc:description><rdf:Alt><rdf:li xml:lang='x-default'/></rdf:Alt></dc:description>", f" {DC_NS}"),
            wrap(
                "<dc:description><rdf:Alt><rdf:li xml:lang='x-default'>new</rdf:li></rdf:Alt></dc:description>",
                f" {DC_NS}",
            ),
        ),
    ],
)
def test_where_there_is_none_yet(source: Source, old: str, new: str) -> None:
    put(source, old)
    assert not Xmp().has(source)
    data = write(source, "error", "new")
    assert data.decode() == new.replace("NEW", '<rdf:li xml:lang="x-default">new</rdf:li>')
    assert texts(data)["x-default"] == "new"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (wrap("", f" {DC_NS} dc:description='OLD'"), wrap("", f' {DC_NS} dc:description="OLD, n &lt; w"')),
        (
            wrap("", f' {D_NS} n="x d:description=" d:description = "OLD"'),
            wrap("", f' {D_NS} n="x d:description=" d:description = "OLD, n &lt; w"'),
        ),
        (
            wrap("<dc:description>OLD</dc:description>", f" {DC_NS}"),
            wrap(
                '<dc:description><rdf:Alt><rdf:li xml:lang="x-default">OLD, n &lt; w</rdf:li></rdf:Alt>'
                "</dc:description>",
                f" {DC_NS}",
            ),
        ),
        (
            wrap(
                "<dc:description><rdf:Bag><rdf:li>OLD</rdf:li><rdf:li>b</rdf:li></rdf:Bag></dc:description>",
                f" {DC_NS}",
            ),
            wrap(
                "<dc:description><rdf:Bag><rdf:li>OLD, n &lt; w</rdf:li><rdf:li>b</rdf:li></rdf:Bag></dc:description>",
                f" {DC_NS}",
            ),
        ),
        (
            wrap("<dc:description><rdf:Alt><rdf:li><![CDATA[ OLD ]]></rdf:li></rdf:Alt></dc:description>", f" {DC_NS}"),
            wrap("<dc:description><rdf:Alt><rdf:li>OLD, n &lt; w</rdf:li></rdf:Alt></dc:description>", f" {DC_NS}"),
        ),
    ],
)
def test_other_forms_of_a_description(source: Source, old: str, new: str) -> None:
    put(source, old)
    assert Xmp().has(source)
    assert write(source, "append", "n < w").decode() == new


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig", "latin-1"])
def test_the_encoding_is_kept(source: Source, encoding: str) -> None:
    text = wrap("<dc:description>gr\xfcn</dc:description>", f" {DC_NS}")
    if encoding == "utf-16-be":
        text = "\ufeff" + text
    if encoding == "latin-1":
        text = f'<?xml version="1.0" encoding="ISO-8859-1"?>\n{text}'
    put(source, text.encode(encoding))
    data = write(source, "append", "\u20ac")
    assert data[:2] == text.encode(encoding)[:2]
    assert texts(data) == {"x-default": "gr\xfcn, \u20ac"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("not xml", "syntax error"),
        (FOREIGN[:-200], "no element|unclosed"),
        ("<a/>", "rdf:RDF"),
        (f"<!DOCTYPE x [<!ENTITY a 'b'>]>{wrap('')}", "DOCTYPE"),
        (f"<!DOCTYPE rdf:RDF SYSTEM 'file:///etc/passwd'>{wrap('')}", "DOCTYPE"),
        (wrap("<dc:x/>"), "unbound prefix"),
        (wrap("&undefined;"), "undefined entity"),
        (wrap("<dc:description><b/></dc:description>", f" {DC_NS}"), "neither"),
        (wrap('<dc:description rdf:resource="x"/>', f" {DC_NS}"), "neither"),
        (
            wrap("<dc:description><rdf:Alt><rdf:li><b/></rdf:li></rdf:Alt></dc:description>", f" {DC_NS}"),
            "plain text",
        ),
        (b'<?xml version="1.0" encoding="latin-9000"?><a/>', "latin-9000"),
        (b'<?xml version="1.0" encoding="hex"?><a/>', "hex"),
        (b"\xff\xfe<\0a", "truncated"),
        (wrap("\xe9").encode("latin-1"), "utf-8"),
        (b"\x89PNG\0", "utf-8|not well-formed"),
    ],
)
def test_what_is_no_xmp_is_left_alone(source: Source, content: str | bytes, reason: str) -> None:
    path = put(source, content)
    before = path.read_bytes()
    for call in (lambda: Xmp().has(source), lambda: write(source, "overwrite", "new")):
        with pytest.raises(InputError, match=reason) as caught:
            call()
        assert caught.value.kind == "xmp"
        assert "a.xmp" in caught.value.message
    assert path.read_bytes() == before


def test_what_xml_cannot_hold_is_removed(source: Source) -> None:
    data = write(source, "skip", "a\x00b\x0bc\ud800d\udcffe\ufffff\U0001f600]]>\x85g\nh")
    assert texts(data) == {"x-default": "ab cdef\U0001f600]]> g h"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.text(), st.text(), st.sampled_from([FOREIGN, wrap(""), wrap("", f" {DC_NS} dc:description='OLD'")]))
def test_any_text_reads_back(source: Source, first: str, second: str, content: str) -> None:
    put(source, content)
    write(source, "overwrite", first)
    one = texts(write(source, "overwrite", second))["x-default"]
    Xmp().target(source).unlink()
    assert texts(write(source, "overwrite", second))["x-default"] == one
    both = texts(write(source, "append", first))["x-default"]
    assert both.startswith(one)


def test_urls_and_shared_sidecars_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="http://h/a"):
        Xmp().check([Source("http://h/a.jpg", is_url=True)])
    with pytest.raises(UsageError, match=r"a\.xmp"):
        Xmp().check([Source("p/a.jpg"), Source("p/a.png")])


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    source = Source(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.jpg"))
    write(source, "skip", "x")
    assert (tmp_path / os.fsdecode(b"\xff\n.xmp")).exists()
    assert Xmp().has(source)
