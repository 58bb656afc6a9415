"""A chat template run where it can do no harm: jinja2's sandbox, in a process of its own with limits.

This file is also that process: started by its path with ``python -I``, it reads one JSON object from stdin
(``template``, ``conversations``) and writes one (``outcomes``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 2
WALL_SECONDS = 20
MEMORY_BYTES = 512 * 1024 * 1024
MAX_CHARS = 256 * 1024
"""What one rendering may write."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One conversation rendered."""

    text: str | None
    """None when it failed."""
    error: str | None = None
    """``refused`` (the template raised it itself), ``security``, ``undefined``, ``size``, ``failed``."""
    words: str = ""
    """What the error says."""


def render_apart(template: str, conversations: Sequence[Sequence[Message]]) -> list[Outcome] | None:
    """Render each conversation as transformers would, with a generation prompt, in a process with limits.

    None when the process did not end by itself: over 2 s of processor time, 512 MiB of memory, or 20 s.
    """
    asked = json.dumps({"template": template, "conversations": conversations})
    command = [sys.executable, "-I", "-S", "-B", __file__, *(path for path in sys.path if path)]
    try:
        run = subprocess.run(
            command,
            input=asked,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=WALL_SECONDS,
            check=False,
        )
        answers = json.loads(run.stdout) if run.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError):
        return None
    return None if answers is None else [Outcome(**answer) for answer in answers["outcomes"]]


def make_environment() -> ImmutableSandboxedEnvironment:
    """jinja2 as transformers sets it up for chat templates (``transformers.utils.chat_template_utils``)."""
    from datetime import datetime

    import jinja2
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(jinja2.ext.Extension):
        """``{% generation %}`` marks what the assistant says; it renders its body."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateRuntimeError(f"refused: {message}")

    def tojson(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _render(template: Any, conversation: Sequence[Message]) -> dict[str, Any]:
    import jinja2
    from jinja2.exceptions import SecurityError

    pieces, size = [], 0
    try:
        for piece in template.generate(
            messages=list(conversation),
            add_generation_prompt=True,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="</s>",
            unk_token="<unk>",
        ):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_CHARS:
                return _failed("size", f"over {MAX_CHARS} characters for {len(conversation)} short messages")
    except SecurityError as err:
        return _failed("security", err)
    except jinja2.UndefinedError as err:
        return _failed("undefined", err)
    except jinja2.TemplateRuntimeError as err:
        words = str(err)
        if words.startswith("refused: "):
            return _failed("refused", words.removeprefix("refused: "))
        return _failed("failed", words)
    except MemoryError:
        return _failed(
            "size", f"over {MEMORY_BYTES >> 20} MiB of memory for {len(conversation)} short messages"
        )
    except Exception as err:  # a stranger's expression can raise anything
        return _failed("failed", f"{type(err).__name__}: {err}")
    return {"text": "".join(pieces), "error": None, "words": ""}


def _failed(error: str, words: object) -> dict[str, Any]:
    return {"text": None, "error": error, "words": str(words)[:500]}


def _main() -> None:
    import resource

    sys.path[:] = sys.argv[1:]
    asked = json.load(sys.stdin)
    environment = make_environment()
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    with suppress(ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        template = environment.from_string(asked["template"])
    except Exception as err:  # what parses need not compile: a break outside of a loop, too deep a nesting
        outcomes = [_failed("failed", f"{type(err).__name__}: {err}") for _ in asked["conversations"]]
    else:
        outcomes = [_render(template, conversation) for conversation in asked["conversations"]]
    sys.stdout.write(json.dumps({"outcomes": outcomes}))


if __name__ == "__main__":
    _main()
