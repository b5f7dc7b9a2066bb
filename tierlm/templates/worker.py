"""Renders one chat template in a process of its own, with limits on memory and processor time.

``template.py`` runs this file as a script. It reads a request from stdin and writes the reply to stdout, both JSON.
Filters, globals and extensions are those of `transformers`, whose prompts it reproduces byte for byte.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

MEMORY = 256 << 20  # bytes of address space; Python and jinja2 take 25 MB
SECONDS = 2  # of processor time
LONGEST = 16 << 20  # characters of a prompt


def compile_template(text: str) -> Any:
    """The template, which runs in jinja2's sandbox."""
    from jinja2 import TemplateError, nodes, pass_eval_context
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant wrote; it has a scope of its own, and no other effect."""

        tags = {"generation"}  # noqa: RUF012  (as the base class has it)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        @pass_eval_context
        def _write(self, context: nodes.EvalContext, caller: Any) -> Any:
            return caller()

    class Dict:
        """``dict`` without the class behind it."""

        def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
            return dict(*args, **fields)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    class Fields(Namespace):
        """``namespace`` without names of Python's own."""

        def __init__(*args: Any, **fields: Any) -> None:  # a template may set a field called "self"
            values = dict(*args[1:], **fields)
            for name in values:
                check(name)
            Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    def check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have a field called {name!r}")

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson  # jinja2's own escapes HTML
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.globals["dict"] = Dict()
    environment.globals["namespace"] = Fields
    return environment.from_string(text)


def reply(request: dict[str, Any]) -> dict[str, Any]:
    """``{"text": ...}``, or ``{"error": message, "line": of the template or None, "broken": ...}``, in which ``broken``
    says whether the template is wrong for all messages."""
    template = None
    try:
        template = compile_template(request["template"])
        text = template.render(request["variables"])
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MiB of memory", "line": None, "broken": True}
    except Exception as error:  # a template is foreign code: it may raise anything
        line = getattr(error, "lineno", None) or _line(error)
        return {"error": str(error) or type(error).__name__, "line": line, "broken": template is None}
    if len(text) > LONGEST:
        return {"error": f"its prompt has more than {LONGEST} characters", "line": None, "broken": True}
    return {"text": text}


def _line(error: Exception) -> int | None:
    """The line of the template that ran last. jinja2 puts the template's lines into tracebacks."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def main() -> None:
    for kind, limit in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        most = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit, limit) if most == resource.RLIM_INFINITY else (min(limit, most),) * 2)
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    json.dump(reply(request), sys.stdout)


if __name__ == "__main__":
    main()
