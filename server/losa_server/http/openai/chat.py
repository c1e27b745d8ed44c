"""POST /v1/chat/completions: messages through the checkpoint's chat template, and what comes back as a message."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from losa_runtime.core.errors import InvalidRequest, LosaError
from losa_server.errors import ClientGone
from losa_server.http.body import read_object, unless_disconnected
from losa_server.http.fields import flag, mapping, refuse
from losa_server.http.openai.answer import Chunks, Json, envelope, usage
from losa_server.http.openai.call import Call, check_model, make_call, top_logprobs
from losa_server.http.openai.chat_choices import MessageChoices, message_choice
from losa_server.http.openai.messages import parse_messages
from losa_server.http.openai.tool_calls import OPEN
from losa_server.http.openai.tools import Tools, parse_tools
from losa_server.http.openai.wishes import parse_body
from losa_server.http.replies import json_reply
from losa_server.http.streaming import manager_of, stream_events, visit_of
from losa_server.rendering.renderer import Renderer
from losa_server.request_manager import Generation, RequestManager

router = APIRouter()

REFUSED: dict[str, str] = {
    "audio": "null (the models are text only)",
    "functions": "null (use `tools`)",
    "function_call": "null (use `tool_choice`)",
    "prediction": "null (there is no speculation on a given text)",
    "web_search_options": "null (there is no search)",
    "verbosity": "null (say it in a message)",
    "store": "false (nothing is stored)",
    "chat_template": "null (only the checkpoint's own template is used)",
    "continue_final_message": "false (send the whole text to /v1/completions)",
    "documents": "null (put them into a message)",
}
# Arguments of templates that a request may set, all of them switches.
TEMPLATE_KWARGS = ("enable_thinking", "thinking", "preserve_thinking")


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation. Streams chunks when `stream` is true."""
    manager = manager_of(request)
    renderer: Renderer = request.app.state.renderer
    call, tools = await unless_disconnected(request, parse_chat(manager, renderer, await read_object(request)))
    created = int(time.time())
    if call.stream:

        def make(generations: Sequence[Generation]) -> Chunks:
            choices = MessageChoices(manager.tokenizer, call, tools.names)
            return Chunks(call, created, "chat.completion.chunk", generations, choices)

        return await stream_events(request, call.asks, make, call.words.explain)
    try:
        generations = await unless_disconnected(request, manager.generate(call.asks, visit_of(request)))
    except ClientGone:
        raise
    except LosaError as error:
        raise call.words.explain(error) from None
    made = [message_choice(manager.tokenizer, call, tools.names, i, g) for i, g in enumerate(generations)]
    return json_reply({**envelope(call, created, "chat.completion", made), "usage": usage(generations, call.n)})


async def parse_chat(manager: RequestManager, renderer: Renderer, body: Json) -> tuple[Call, Tools]:
    """Validate a body and render its messages. Raises RequestFailed or InvalidRequest naming the field."""
    check_model(manager, body.get("model"))
    refuse(body, REFUSED)
    _check_modes(body)
    tools = await asyncio.to_thread(parse_tools, body)  # schemas may be large
    if tools.pattern is not None:
        body = {**body, "regex": tools.pattern, "response_format": None}
    if tools.names and OPEN in manager.tokenizer.special_texts:  # where they are special, calls would be skipped
        body = {**body, "skip_special_tokens": False}
    wishes = parse_body(body, ("max_completion_tokens", "max_tokens"), None)
    if tools.pattern is not None:
        wishes.words.names["regex"] = "tool_choice"
    logprobs = top_logprobs(body, "top_logprobs")
    if logprobs and not flag(body, "logprobs"):
        raise InvalidRequest("top_logprobs", logprobs, "null without `logprobs`")
    conversation: Json = {"messages": parse_messages(body.get("messages")), **_template_kwargs(body)}
    if tools.offered:
        if "tools" not in await renderer.variables():
            raise InvalidRequest("tools", tools.offered, "null (the checkpoint's chat template has no place for them)")
        conversation["tools"] = tools.offered
    ids = await manager.encode(await renderer.render(conversation), "messages")
    wanted = logprobs if flag(body, "logprobs") else None
    return make_call(manager, body, [("messages", tuple(ids))], wishes, "chatcmpl", wanted), tools


def _check_modes(body: Json) -> None:
    modalities: Any = body.get("modalities")
    if modalities not in (None, [], ["text"]):
        raise InvalidRequest("modalities", modalities, "['text'] (the models are text only)")
    effort = body.get("reasoning_effort")
    if effort not in (None, "none"):
        allowed = "null (templates that know modes are switched by `chat_template_kwargs`)"
        raise InvalidRequest("reasoning_effort", effort, allowed)
    if not flag(body, "add_generation_prompt", True):
        raise InvalidRequest("add_generation_prompt", False, "true or null")


def _template_kwargs(body: Json) -> Json:
    given = mapping(body, "chat_template_kwargs")
    for name, value in given.items():
        if name not in TEMPLATE_KWARGS:
            raise InvalidRequest(f"chat_template_kwargs.{name}", value, f"one of {', '.join(TEMPLATE_KWARGS)}")
        if type(value) is not bool:
            raise InvalidRequest(f"chat_template_kwargs.{name}", value, "true or false")
    return given
