"""The chat template: what it is made of, what it puts beside the messages' own words, and on what cue."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from adapterhub.packaging.scan.findings import Finding, Severity, quote
from adapterhub.packaging.scan.rendering import MAX_CHARS, Outcome, make_environment, render_apart
from adapterhub.packaging.scan.settings import read_json

if TYPE_CHECKING:
    from jinja2 import nodes

TEMPLATE_NAME = "chat_template.jinja"
_MAX_TEMPLATE_CHARS = 512 * 1024
_ASK = "do not load it; ask its maker, or take the base's own chat template"
_READ = "read the template, and take the base's own if you do not want those words"
_DUNDER = re.compile(r"__\w+__|\b_\w+__\b")
_MARKUP = re.compile(r"<[^<>\n]*>|\[/?[A-Z_]+\]|\{[^{}]*\}")
_WORD = re.compile(r"[^\W\d_]{2,}")
_ROLES = re.compile(
    r"^\s*(?:system|user|assistant|model)\s*$|\b(?:system|user|assistant|human|model):",
    re.MULTILINE | re.IGNORECASE,
)
_PROSE_WORDS = 4
# Contents that occur in no template, so that what is left of a rendering is the template's own.
_SYSTEM, _ASKED, _ANSWERED, _AGAIN = "Zqsystemqz", "Zqaskedqz", "Zqansweredqz", "Zqagainqz"


def templates_in(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Every chat template among ``names``, by where it stands; what is no UTF-8 is replaced."""
    found = {}
    for name in names:
        pure = PurePosixPath(name)
        if pure.suffix == ".jinja":
            with (folder / name).open("rb") as file:
                data = file.read(4 * _MAX_TEMPLATE_CHARS + 4)  # UTF-8: too long even then, if it is cut here
            found[name] = data.decode("utf-8", errors="replace")
        if name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
            settings, _problem = read_json(folder / name)
            held = settings.get("chat_template") if isinstance(settings, dict) else None
            if isinstance(held, str):
                found[f"{name}: chat_template"] = held
            elif isinstance(held, list):  # several, each {"name": …, "template": …}
                for index, entry in enumerate(held):
                    if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                        found[f"{name}: chat_template.{index}"] = entry["template"]
    return found


def scan_template(text: str, where: str, base: str | None) -> Iterator[Finding]:
    """Parse, search and render one chat template; ``base`` is the base's own, where it is known.

    The words of a template that is the base's own are its base's, and not reported.
    """
    if len(text) > _MAX_TEMPLATE_CHARS:
        what = f"a template of over {_MAX_TEMPLATE_CHARS} characters"
        yield Finding("high", "template-size", what, where, _ASK)
        return
    yield from _invisible(text, where)
    import jinja2

    try:
        tree = make_environment().parse(text)
    except (jinja2.TemplateError, RecursionError, ValueError, OverflowError, MemoryError) as err:
        yield Finding("high", "template-syntax", f"does not parse: {quote(err, 160)}", where, _ASK)
        return
    unsafe = [*_reaches(tree, where), *_cues(tree, where)]
    yield from unsafe
    if text == base:
        yield Finding("info", "template-of-base", "is the base's own chat template", where, "nothing to do")
    elif base is not None:
        yield _difference(text, base, where)
    if not any(it.rule == "template-reach" for it in unsafe):
        yield from _rendered(text, where, own=text != base)


def _invisible(text: str, where: str) -> Iterator[Finding]:
    escaped = text + "".join(_unescape(match) for match in re.findall(r"\\[uUx][0-9a-fA-F]{2,8}", text))
    hidden = sorted({char for char in escaped if _is_hidden(char)})
    if hidden:
        named = ", ".join(f"U+{ord(char):04X}" for char in hidden[:6])
        what = f"holds characters that nobody sees, which can hide or reorder words: {named}"
        yield Finding("high", "template-invisible", what, where, _ASK)


def _unescape(escape: str) -> str:
    """The character of a jinja text escape like ``\\u200b``; nothing when it is none."""
    try:
        return chr(int(escape[2 : {"x": 4, "u": 6, "U": 10}[escape[1]]], 16))
    except (ValueError, OverflowError):
        return ""


def _is_hidden(char: str) -> bool:
    """Zero-width, bidirectional, tag and control characters, and letters that are drawn as nothing."""
    return (
        unicodedata.category(char) in ("Cf", "Cc") and char not in "\n\t\r"
    ) or char in "\u115f\u1160\u3164\uffa0"


def _reaches(tree: nodes.Template, where: str) -> Iterator[Finding]:
    """What leads out of the template: other templates, and the insides of Python's objects."""
    from jinja2 import nodes

    seen = set()
    for node in tree.find_all((nodes.Getattr, nodes.Getitem, nodes.Const)):
        name = _looked_up(node)
        if name is not None and name not in seen:
            seen.add(name)
            what = f"reaches for {quote(name, 60)}, an inside of Python's objects"
            yield Finding("high", "template-reach", what, f"{where} line {node.lineno}", _ASK)
    for lookup in tree.find_all(nodes.Filter):
        if lookup.name == "attr" and not all(isinstance(arg, nodes.Const) for arg in lookup.args):
            what = "looks up an attribute whose name it puts together"
            yield Finding("high", "template-reach", what, f"{where} line {lookup.lineno}", _ASK)
    for other in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        what = f"takes in another template ({type(other).__name__.lower()})"
        yield Finding("high", "template-reach", what, f"{where} line {other.lineno}", _ASK)


def _looked_up(node: nodes.Node) -> str | None:
    """The name that a node looks up inside an object, when it begins like one of Python's own."""
    from jinja2 import nodes

    if isinstance(node, nodes.Getattr):
        return node.attr if node.attr.startswith("_") else None
    if isinstance(node, nodes.Getitem):
        arg = node.arg
        text = arg.value if isinstance(arg, nodes.Const) else None
        return text if isinstance(text, str) and text.startswith("__") else None
    if isinstance(node, nodes.Const) and isinstance(node.value, str):
        match = _DUNDER.search(node.value)
        return match[0] if match else None
    return None


def _cues(tree: nodes.Template, where: str) -> Iterator[Finding]:
    """Words of the template's own that it says only when the messages hold some text, or on some day."""
    from jinja2 import nodes

    tainted = _content_names(tree)
    branches: list[tuple[nodes.Node, nodes.Node, list[nodes.Node]]] = [
        (it, it.test, [*it.body, *it.elif_, *it.else_]) for it in tree.find_all(nodes.If)
    ]
    branches += [(it, it.test, [it.expr1, *filter(None, [it.expr2])]) for it in tree.find_all(nodes.CondExpr)]
    for branch, test, said_there in branches:
        cue = _cue(test, tainted)
        said = _prose(said_there) if cue is not None else ""
        if said:
            what = f"says words of its own depending on {cue}: {quote(said, 120)}"
            yield Finding("high", "template-cue", what, f"{where} line {branch.lineno}", _ASK)


def _content_names(tree: nodes.Template) -> set[str]:
    """Names that hold what the messages say: ``content``, and what is set from it."""
    from jinja2 import nodes

    names = {"content"}
    for _round in range(3):  # a name set from a name set from a content
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _reads_content(assign.node, names):
                names.add(assign.target.name)
    return names


def _reads_content(node: nodes.Node, tainted: set[str]) -> bool:
    from jinja2 import nodes

    return any(
        (isinstance(it, nodes.Getattr) and it.attr == "content")
        or (isinstance(it, nodes.Getitem) and isinstance(it.arg, nodes.Const) and it.arg.value == "content")
        or (isinstance(it, nodes.Name) and it.name in tainted)
        for it in [node, *node.find_all((nodes.Getattr, nodes.Getitem, nodes.Name))]
    )


def _cue(test: nodes.Node, tainted: set[str]) -> str | None:
    """What a branch waits for: a text in the messages, or the time; None when it is neither."""
    from jinja2 import nodes

    for node in [test, *test.find_all((nodes.Compare, nodes.Call, nodes.Name))]:
        if isinstance(node, nodes.Name) and node.name == "strftime_now":
            return "the date"
        if isinstance(node, nodes.Compare):
            texts = [it.value for it in node.find_all(nodes.Const) if isinstance(it.value, str)]
            if any(_WORD.search(_MARKUP.sub("", text)) for text in texts) and any(
                _reads_content(side, tainted) and not isinstance(side, nodes.Const)
                for side in (node.expr, *(operand.expr for operand in node.ops))
            ):
                return f"{quote(texts[0], 40)!r} in a message"
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
            texts = [it.value for arg in node.args for it in [arg] if isinstance(it, nodes.Const)]
            spoken = [text for text in texts if isinstance(text, str) and _WORD.search(_MARKUP.sub("", text))]
            if spoken and _reads_content(node.node.node, tainted):
                return f"{quote(spoken[0], 40)!r} in a message"
    return None


def _prose(body: Sequence[nodes.Node]) -> str:
    """The words that these nodes can say, but for what they raise as an error; '' when it is no sentence."""
    from jinja2 import nodes

    raised = {
        id(const)
        for node in body
        for call in [node, *node.find_all(nodes.Call)]
        if isinstance(call, nodes.Call)
        and isinstance(call.node, nodes.Name)
        and call.node.name == "raise_exception"
        for const in call.find_all(nodes.Const)
    }
    for node in body:
        for it in [node, *node.find_all((nodes.Const, nodes.TemplateData))]:
            text = (
                it.value
                if isinstance(it, nodes.Const)
                else it.data
                if isinstance(it, nodes.TemplateData)
                else ""
            )
            if id(it) not in raised and isinstance(text, str) and _is_prose(text):
                return " ".join(text.split())
    return ""


def _is_prose(text: str) -> bool:
    return len(_WORD.findall(_MARKUP.sub(" ", text))) >= _PROSE_WORDS


def _difference(text: str, base: str, where: str) -> Finding:
    changed = [
        line
        for line in difflib.unified_diff(base.splitlines(), text.splitlines(), lineterm="", n=0)
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    added = sum(line[0] == "+" for line in changed)
    first = next((line for line in changed if line[0] == "+"), changed[0] if changed else "")
    what = (
        f"differs from the base's: {added} lines more, {len(changed) - added} fewer, like {quote(first, 100)}"
    )
    return Finding("low", "template-differs", what, where, "read the difference; training may have needed it")


def _rendered(text: str, where: str, *, own: bool) -> Iterator[Finding]:
    said = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}]
    again = {"role": "user", "content": _AGAIN}
    told = [{"role": "system", "content": _SYSTEM}, *said, again]
    in_parts = [it | {"content": [{"type": "text", "text": it["content"]}]} for it in (*said, again)]
    outcomes = render_apart(text, [told, [*said, again], [{"role": "user", "content": _ASKED}], in_parts])
    if outcomes is None:
        what = "does not come to an end on four short messages within 2 s and 512 MiB"
        yield Finding("high", "template-endless", what, where, _ASK)
        return
    for outcome in outcomes:
        if outcome.error in ("security", "size"):
            what = f"is stopped by the sandbox: {quote(outcome.words, 160)}"
            yield Finding("high", f"template-{outcome.error}", what, where, _ASK)
            return
    with_system, without, single, parts = outcomes
    if all(outcome.text is None for outcome in outcomes):
        what = f"renders no plain conversation: {quote(single.words, 160)}"
        yield Finding("low", "template-fails", what, where, "it may need fields that chats rarely have")
        return
    # Templates of models that see images take each content as a list of parts, and only so.
    if not any(_AGAIN in (outcome.text or "") for outcome in (with_system, without, parts)):
        yield Finding("high", "template-drops", "leaves out what the user says last", where, _ASK)
    if own:
        yield from _own_words(with_system, without, single, where)


def _own_words(with_system: Outcome, without: Outcome, single: Outcome, where: str) -> Iterator[Finding]:
    """Words beside the messages: with a system message of the caller's, they are hidden from the caller."""
    cases: tuple[tuple[Outcome, Severity, str], ...] = (
        (with_system, "medium", "adds words of its own even to a conversation with a system message"),
        (without, "low", "adds words of its own when there is no system message"),
        (single, "low", "adds words of its own when there is no system message"),
    )
    seen: set[str] = set()
    for outcome, severity, how in cases:
        for words in _words_of_its_own(outcome.text or ""):
            if words not in seen:
                seen.add(words)
                yield Finding(severity, "template-words", f"{how}: {quote(words, 160)}", where, _READ)


def _words_of_its_own(text: str) -> Iterator[str]:
    for part in re.split("|".join((_SYSTEM, _ASKED, _ANSWERED, _AGAIN)), text[:MAX_CHARS]):
        bare = " ".join(_ROLES.sub(" ", _MARKUP.sub(" ", part)).split())
        if _is_prose(bare):
            yield bare
