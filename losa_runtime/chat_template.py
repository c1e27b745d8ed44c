"""A checkpoint's chat template: messages to the text that the model was trained on. Knows no tokenizer and no server.

Templates are programs from strangers. The sandbox keeps them from attributes and from our objects; it bounds neither
their time nor their memory, so whoever renders other people's messages does it where it can be ended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from losa_runtime.core.errors import InvalidRequest

# For checkpoints without a template: what SGLang's frontend sends for models that it does not know.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ (message.role | upper) ~ ':' ~ message.content ~ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_FAULTS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplate:
    """source: Jinja. names: what the template may use by name beside its arguments, e.g. `bos_token`.

    Raises InvalidRequest (field `messages`) when the source is no template.
    """

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        self._names = dict(names)
        sandbox = _sandbox()
        try:
            self.variables = frozenset(meta.find_undeclared_variables(sandbox.parse(source)))
            self._template: Template = sandbox.from_string(source)
        except (TemplateError, RecursionError) as error:
            allowed = f"plain text: the chat template is broken ({error})"
            raise InvalidRequest("messages", "a conversation", allowed) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        longest: int | None = None,
        **arguments: Any,
    ) -> str:
        """The text of a conversation. arguments: e.g. `tools`, `enable_thinking`. longest: characters at most.

        Raises InvalidRequest when the template cannot render these messages, or not within `longest`.
        """
        names = {**self._names, "add_generation_prompt": add_generation_prompt, **arguments, "messages": messages}
        parts, size = [], 0
        try:
            for part in self._template.generate(names):
                parts.append(part)
                size += len(part)
                if longest is not None and size > longest:
                    raise InvalidRequest("messages", messages, f"what renders to at most {longest} characters")
        except _FAULTS as error:
            allowed = f"what the checkpoint's chat template can render ({error})"
            raise InvalidRequest("messages", messages, allowed) from None
        return "".join(parts)


def _sandbox() -> ImmutableSandboxedEnvironment:
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _raise
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
