"""Grammars of output constraints, in llguidance's dialect of Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loramill.serve.protocol import OutputConstraint

#: Between two tokens of JSON: nothing, a space, or a new line with its indentation. If any white space were allowed,
#: some models would generate white space until they reach max_tokens.
_SPACE = r"( |\n[ \t]{0,20})"


def build_grammar(constraint: OutputConstraint, begin_tag: str, end_tag: str) -> str:
    """Builds the grammar of a constraint; tool calls are as Hermes and Qwen write them.

    Args:
        constraint: with a schema, tool calls or both.
        begin_tag: the terminal before a call.
        end_tag: the terminal after a call.
    """
    rules = [] if constraint.schema is None else [f"json: {_json(constraint.schema)}"]
    kinds = [rule.partition(":")[0] for rule in rules]
    if constraint.tool_schemas:
        kinds.append('call ("\\n" call)*' if constraint.parallel_tool_calls else "call")
        rules += _call_rules(constraint.tool_schemas, begin_tag, end_tag)
    return "\n".join([f"start: {' | '.join(kinds)}", *rules])


def _call_rules(calls: Mapping[str, Mapping[str, Any]], begin: str, end: str) -> Sequence[str]:
    names = [f"call_{index}" for index in range(len(calls))]
    rules = [f'call: {begin} "\\n" ({" | ".join(names)}) "\\n" {end}']
    for rule, (tool, schema) in zip(names, calls.items(), strict=True):
        head = f'{{"name": {json.dumps(tool)}, "arguments": '
        rules += [f'{rule}: {json.dumps(head)} {rule}_arguments "}}"', f"{rule}_arguments: {_json(schema)}"]
    return rules


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": _SPACE}})
