"""Captions as `dc:description` in an XMP sidecar: `a.jpg` -> `a.xmp`, as Adobe's programs name it.

A file that is already there is not parsed into a tree and written anew, but changed at one place: all else in it (other
namespaces, prefixes, comments, packet wrappers, other languages, even the white space) stays byte for byte.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

from dbcap.captioning.beside import (
    Existing,
    already_there,
    beside,
    combine,
    join,
    one_line,
    read_existing,
    refuse_collisions,
    replace,
)
from dbcap.errors import InputError
from dbcap.inputs import Source, shown
from dbcap.plugins.api import Record

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_DC = "http://purl.org/dc/elements/1.1/"
_XML = "http://www.w3.org/XML/1998/namespace"
_CONTAINERS = (f"{_RDF} Alt", f"{_RDF} Bag", f"{_RDF} Seq")
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TAG = re.compile(rb"""<(?:[^>"']|"[^"]*"|'[^']*')*>""")
_ENCODING = re.compile(rb"""\s*<\?xml\s[^>]*?encoding\s*=\s*["']([A-Za-z0-9._-]+)["']""")

_NEW = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">
   {property}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""


class Xmp:
    """The best caption as the `x-default` text of `dc:description`. Appending and prepending join with ", ".

    A file that is no XMP or has a document type (which could hold anything, or grow without bound) is an `InputError`
    of the kind `xmp`, and is left as it is.
    """

    def target(self, source: Source) -> Path:
        """Return the path of the sidecar."""
        return beside(source, ".xmp")

    def check(self, sources: Iterable[Source]) -> None:
        """Refuse URLs and two images with the same sidecar."""
        refuse_collisions(sources, self)

    def has(self, source: Source) -> bool:
        """Return whether the sidecar has a description that is not empty."""
        target = self.target(source)
        data = read_existing(target)
        return bool(data.strip()) and bool(_Sidecar(target, data).text)

    def write(self, source: Source, record: Record, existing: Existing) -> None:
        """Write or change the sidecar."""
        target = self.target(source)
        text = _FORBIDDEN.sub("", one_line(record.caption)).strip()
        data = read_existing(target)
        if not data.strip():
            replace(target, _NEW.format(property=_property(text, {"rdf": _RDF, "dc": _DC})).encode())
            return
        old = _Sidecar(target, data)
        if old.text and existing == "skip":
            return
        if old.text and existing == "error":
            raise already_there(target)
        if old.text and existing != "overwrite":
            text = join(*combine([old.text], [text], existing))
        replace(target, old.with_text(text))

    def flush(self) -> None:
        """Do nothing: every caption is on disk as soon as it is written."""


@dataclass(slots=True)
class _Element:
    """An element of the file: `name` as `namespace local`, `start` of its first tag and of its last as byte offsets."""

    name: str
    attributes: dict[str, str]
    scope: dict[str, str]
    tag: bytes
    start: int
    end: int = 0
    text: str = ""
    children: list[_Element] = field(default_factory=list)

    @property
    def qualified(self) -> str:
        """The name as written in the file, with its prefix."""
        return re.split(rb"[\s/>]", self.tag[1:], maxsplit=1)[0].decode()

    def child(self, *names: str) -> _Element | None:
        """Return the first child with one of these names."""
        return next((child for child in self.children if child.name in names), None)


class _Sidecar:
    """The parts of an XMP file that a description can be in. `text` is the description, empty if there is none."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path = path
        self._encoding, self._mark = _encoding_of(data)
        try:
            self._data = data.removeprefix(self._mark).decode(self._encoding).encode()
        except (UnicodeError, LookupError) as error:
            raise self._refused(str(error)) from error
        self._rdf = self._parse()
        descriptions = [child for child in self._rdf.children if child.name == f"{_RDF} Description"]
        self._home = descriptions[0] if descriptions else None
        self._property: _Element | None = None
        self._item: _Element | None = None
        self.text = ""
        for description in descriptions:
            found = description.child(f"{_DC} description")
            if found or f"{_DC} description" in description.attributes:
                self._home, self._property = description, found
                self._read()
                break

    def _read(self) -> None:
        """Find the element with the text and the text, for the description that is there."""
        assert self._home is not None
        if self._property is None:
            self.text = self._home.attributes[f"{_DC} description"].strip()
            return
        container = self._property.child(*_CONTAINERS)
        if container is None:
            if self._property.children or any(name.startswith(_RDF) for name in self._property.attributes):
                raise self._refused("its dc:description is neither text nor a list of languages")
            self._item = self._property
        else:
            items = [item for item in container.children if item.name == f"{_RDF} li"]
            languages = [item.attributes.get(f"{_XML} lang", "").lower() for item in items]
            best = next((language for language in ("x-default", "") if language in languages), None)
            self._item = items[languages.index(best)] if best is not None else None
        if self._item is not None:
            if self._item.children:
                raise self._refused("the text of its dc:description is no plain text")
            self.text = self._item.text.strip()

    def with_text(self, text: str) -> bytes:
        """Return the file with this description in place of its own."""
        item, home = self._item, self._home
        if home is None:
            prefix = self._rdf.qualified.removesuffix("RDF")
            about = f' {prefix}about=""' if prefix else f' rdf:about="" xmlns:rdf="{_RDF}"'
            inner = _property(text, self._rdf.scope)
            name = f"{prefix}Description"
            return self._with_child(self._rdf, f"\n  <{name}{about}>\n   {inner}\n  </{name}>\n ", at_end=True)
        if self._property is None and f"{_DC} description" in home.attributes:
            return self._with_attribute(home, text)
        if self._property is None:
            return self._with_child(home, f"\n   {_property(text, home.scope)}\n  ", at_end=True)
        if item is None:
            container = self._property.child(*_CONTAINERS)
            assert container is not None
            return self._with_child(container, _item(text, container.scope), at_end=False)
        if item is self._property:
            return self._filled(item, _alternatives(text, item.scope))
        return self._filled(item, escape(text))

    def _with_child(self, element: _Element, child: str, *, at_end: bool) -> bytes:
        if element.tag.endswith(b"/>"):
            return self._filled(element, child)
        place = element.end if at_end else element.start + len(element.tag)
        if at_end:  # before the white space that indents the end tag
            place = len(self._data[:place].rstrip())
            child = child.rstrip()
        return self._spliced(place, place, child)

    def _filled(self, element: _Element, content: str) -> bytes:
        """Return the file with `content` as all that `element` holds."""
        after = element.start + len(element.tag)
        if element.tag.endswith(b"/>"):
            start = element.tag[:-2].rstrip().decode()
            return self._spliced(element.start, after, f"{start}>{content}</{element.qualified}>")
        return self._spliced(after, element.end, content)

    def _with_attribute(self, element: _Element, text: str) -> bytes:
        prefixes = [prefix for prefix, uri in element.scope.items() if uri == _DC and prefix]
        names = b"|".join(re.escape(f"{prefix}:description".encode()) for prefix in prefixes)
        # Attributes are walked one by one, lest the name be found inside the value of another.
        for match in re.finditer(rb"""([^\s=<>"'/]+)\s*=\s*("[^"]*"|'[^']*')""", element.tag):
            if re.fullmatch(names, match[1]):
                start, end = element.start + match.start(2), element.start + match.end(2)
                return self._spliced(start, end, quoteattr(text))
        raise self._refused("its dc:description cannot be found")

    def _spliced(self, start: int, end: int, text: str) -> bytes:
        data = self._data[:start] + text.encode() + self._data[end:]
        return self._mark + data.decode().encode(self._encoding, "xmlcharrefreplace")

    def _refused(self, reason: str) -> InputError:
        return InputError(
            f"{shown(str(self._path))} is no XMP that can be changed: {reason}", "repair it or move it away", kind="xmp"
        )

    def _parse(self) -> _Element:
        """Return the rdf:RDF element. Raises `InputError` if the file is not well formed or has none."""
        parser = expat.ParserCreate("utf-8", " ")
        root = _Element("", {}, {"xml": _XML}, b"", 0)
        way = [root]
        declared: dict[str, str] = {}

        def declare(prefix: str | None, uri: str | None) -> None:
            declared[prefix or ""] = uri or ""

        def start(name: str, attributes: dict[str, str]) -> None:
            at = parser.CurrentByteIndex
            tag = _TAG.match(self._data, at)
            assert tag is not None  # the parser has just read one here
            scope = way[-1].scope | declared if declared else way[-1].scope
            declared.clear()
            element = _Element(name, attributes, scope, tag[0], at)
            way[-1].children.append(element)
            way.append(element)

        def end(_name: str) -> None:
            way.pop().end = parser.CurrentByteIndex

        def characters(text: str) -> None:
            way[-1].text += text

        def doctype(*_: object) -> None:
            raise self._refused("it has a DOCTYPE")

        parser.StartNamespaceDeclHandler = declare
        parser.StartElementHandler = start
        parser.EndElementHandler = end
        parser.CharacterDataHandler = characters
        parser.StartDoctypeDeclHandler = doctype
        parser.buffer_text = True
        try:
            parser.Parse(self._data, True)
        except expat.ExpatError as error:
            raise self._refused(str(error)) from error
        top = root.children[0]
        rdf = top if top.name == f"{_RDF} RDF" else top.child(f"{_RDF} RDF")
        if rdf is None:
            raise self._refused("it holds no rdf:RDF")
        return rdf


def _encoding_of(data: bytes) -> tuple[str, bytes]:
    """Return the encoding of an XML file, and the byte order mark that it starts with."""
    marks = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    for encoding, mark in marks.items():
        if data.startswith(mark):
            return encoding, mark
    declared = _ENCODING.match(data)
    return (declared[1].decode() if declared else "utf-8"), b""


def _names(scope: dict[str, str], prefix: str, uri: str) -> str:
    """Return the declaration that an element needs for `prefix` to mean `uri`, empty if it means that already."""
    return "" if scope.get(prefix) == uri else f' xmlns:{prefix}="{uri}"'


def _property(text: str, scope: dict[str, str]) -> str:
    return f"<dc:description{_names(scope, 'dc', _DC)}>{_alternatives(text, scope)}</dc:description>"


def _alternatives(text: str, scope: dict[str, str]) -> str:
    inner = _item(text, scope | {"rdf": _RDF})
    return f"<rdf:Alt{_names(scope, 'rdf', _RDF)}>{inner}</rdf:Alt>"


def _item(text: str, scope: dict[str, str]) -> str:
    return f'<rdf:li{_names(scope, "rdf", _RDF)} xml:lang="x-default">{escape(text)}</rdf:li>'
