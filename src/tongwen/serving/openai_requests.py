"""What a client may ask OpenAI's API for: chats and completions, field by field.

The request models list all fields that a client may send. An unknown field is an error and is not ignored: an answer that
silently disregards an option is worse than none.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tongwen.core.i18n import _
from tongwen.core.json_schema import schema_problem
from tongwen.core.tool_parser import ToolParser

NO_PARAMETERS = {"type": "object", "properties": {}}
TOP = 20  # likeliest tokens that a request may ask for
TURNS = 1000  # of a conversation, at most
Zero = Annotated[float, Field(ge=0, le=0)]


# Values of words that no field knows, with which they ask for nothing; and words that never change an answer.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("auto",),
    "function_call": ("auto",),
    "parallel_tool_calls": (True,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "best_of": (1,),
    "top_logprobs": (0,),
    "min_p": (0,),
}
WITHOUT_EFFECT = {"metadata", "name", "prompt_cache_key", "safety_identifier"}


class StrictModel(BaseModel):
    """An object of a request: an unknown word is refused, unless it asks for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_neutral_words(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: value for name, value in values.items() if name in cls.model_fields or not _is_neutral(name, value)
        }


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a word that we do not know asks for nothing by this value."""
    if value is None or value is False or value in ("", [], {}, "none") or name in WITHOUT_EFFECT:
        return True
    return any(type(value) is type(one) and value == one for one in NEUTRAL.get(name, ()))


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class CalledFunction(StrictModel):
    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _check_object(cls, text: str) -> str:
        try:
            if isinstance(json.loads(text), dict):
                return text
        except (ValueError, RecursionError):
            pass
        raise ValueError(_("not the JSON text of an object"))


class RequestCall(StrictModel):
    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: CalledFunction


class RequestMessage(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[RequestCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _check_role(self) -> RequestMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError(_("content is missing"))
        if self.tool_calls and self.role != "assistant":
            raise ValueError(_("only an assistant has tool_calls"))
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError(_("a message of a tool, and no other, names the call that it answers: tool_call_id"))
        return self

    def to_dict(self) -> dict[str, Any]:
        text = self.content or ""
        text = text if isinstance(text, str) else "".join(part.text for part in text)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
            for call in message["tool_calls"]:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
            message |= {"name": self.name} if self.name else {}
        return message


class FunctionDefinition(StrictModel):
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None

    @field_validator("parameters")
    @classmethod
    def _check_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema and schema.get("type", "object") != "object":
            raise ValueError(_("the parameters of a function are an object: type"))
        if problem := schema_problem(schema or {}, "parameters"):
            raise ValueError(problem)
        return schema


class ToolDefinition(StrictModel):
    type: Literal["function"]
    function: FunctionDefinition

    def to_dict(self) -> dict[str, Any]:
        function = self.function.model_dump(exclude_none=True)
        return {"type": "function", "function": {"description": "", "parameters": NO_PARAMETERS, **function}}


class FunctionName(StrictModel):
    name: str


class NamedTool(StrictModel):
    type: Literal["function"]
    function: FunctionName


class StreamOptions(StrictModel):
    include_usage: bool = False


class TextFormat(StrictModel):
    type: Literal["text"]


class CompletionRequest(StrictModel):
    """Fields that chat and completions share. The last ones are accepted only with the value that has no effect."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens to give for each token; None for no log probabilities."""
        return None

    @property
    def stops(self) -> list[str]:
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if stop]

    def sampling(self) -> dict[str, Any]:
        """Return the request's sampling options under the names of `Sampling`."""
        values = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed")}
        return {name: value for name, value in values.items() if value is not None} | self._length()

    def _length(self) -> dict[str, int]:
        return {} if self.max_tokens is None else {"max_new_tokens": self.max_tokens}


class ChatRequest(CompletionRequest):
    messages: Annotated[list[RequestMessage], Field(min_length=1, max_length=TURNS)]
    max_completion_tokens: int | None = None
    response_format: TextFormat | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_tools(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError(_("top_logprobs needs logprobs: true"))
        names = [tool.function.name for tool in self.tools or ()]
        if len({*names}) < len(names):
            raise ValueError(_("tools: two have the same name"))
        if self.tool_choice == "required" and not names:
            raise ValueError(_("tool_choice: there are no tools"))
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(_("tool_choice: no tool is called {name!r}").format(name=self.tool_choice.function.name))
        called: set[str] = set()
        for number, message in enumerate(self.messages):
            called |= {call.id for call in message.tool_calls or ()}
            if message.role == "tool" and message.tool_call_id not in called:
                raise ValueError(
                    _("messages.{number}: no call before it has the id {id!r}").format(
                        number=number, id=message.tool_call_id
                    )
                )
        return self

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model sees: none with `tool_choice: none`, so that it cannot call any."""
        return [] if self.tool_choice == "none" else [tool.to_dict() for tool in self.tools or ()]

    def begin(self, parser: ToolParser) -> str:
        """Return what the answer begins with: with `required` or a named function, a call."""
        if isinstance(self.tool_choice, NamedTool):
            return parser.forced(self.tool_choice.function.name)
        return parser.forced(None) if self.tool_choice == "required" else ""

    def _length(self) -> dict[str, int]:
        length = self.max_completion_tokens
        return super()._length() if length is None else {"max_new_tokens": length}


class TextRequest(CompletionRequest):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=TOP)] | Literal[False] | None = None

    @property
    def top(self) -> int | None:
        return self.logprobs if type(self.logprobs) is int else None
