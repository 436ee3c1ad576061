"""Calls of the API, checked before Gradio sees them: whom they call, with which parameters and files.

Gradio would answer a malformed one with its own or pydantic's words, or none, and print their traceback here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import gradio
from gradio.blocks import BlockFunction

from functional_sd3.formats.printable import shorten

_PREFIX = "/gradio_api/call/"


def checker(page: gradio.Blocks) -> Callable[[str, Any], str]:
    """The problem, in words, of a call of a function of the page: its path and the JSON that was sent; "" for none."""
    named = {str(each.api_name): each for each in page.fns.values() if each.api_visibility == "public"}

    def problem(path: str, data: Any) -> str:
        if not isinstance(data, dict):
            return "the body must be an object of JSON"
        version, _, name = path.removeprefix(_PREFIX).rpartition("/")
        if not path.startswith(_PREFIX):
            index = data.get("fn_index")
            if not isinstance(index, int) or index not in page.fns:
                return "fn_index names no function of the page"
            return _of_list(page.fns[index], data)
        function = named.get(name)
        if function is None:
            return f"there is no {shorten(repr(name))}: the API has {', '.join(sorted(named))}"
        return _of_names(name, function, data) if version else _of_list(function, data)

    return problem


def _of_names(name: str, function: BlockFunction, data: Mapping[str, Any]) -> str:
    """The problem of a call whose JSON has the parameters by name."""
    names = function.input_keyword_names or []
    unknown = [each for each in data if each not in names]
    if unknown:
        return f"{shorten(repr(unknown[0]))} is no parameter of {name}, which has {', '.join(names)}"
    if "prompts" not in data:
        return f"{name} needs prompts: what to draw"
    return _of_values(function, [data.get(each) for each in names])


def _of_list(function: BlockFunction, data: Mapping[str, Any]) -> str:
    """The problem of a call whose JSON has the parameters in their order, as "data"."""
    values = data.get("data")
    names = function.input_keyword_names or []
    if not isinstance(values, list) or len(values) < len(function.inputs):
        return f"data must be the list of {len(function.inputs)} values: {', '.join(names)}"
    return _of_values(function, values)


def _of_values(function: BlockFunction, values: list[Any]) -> str:
    """The problem of a value that has no form of its component: of all others `fields.typed` says it."""
    for name, part, value in zip(function.input_keyword_names or [], function.inputs, values, strict=False):
        model = getattr(part, "data_model", None)
        if model is None or value is None:
            continue
        try:
            model.model_validate(value, context={"validate_meta": True})
        except ValueError:  # pydantic's ValidationError is one.
            form = ", ".join(model.model_fields)
            return (
                f"{name} {shorten(repr(value))} must be an object with {form}; its files are uploaded first, "
                'and have path and meta {"_type": "gradio.FileData"}'
            )
    return ""
