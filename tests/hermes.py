"""A byte tokenizer whose chat template lists tools as those of Hermes and Qwen do."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = """{% if tools %}<|im_start|>system
You may call functions:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
Return each call within <tool_call></tool_call>.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'tool' %}<tool_response>
{{ m.content }}
</tool_response>{% else %}{{ m.content }}{% for call in m.tool_calls or [] %}

<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

SPECIAL = ("<|im_start|>", "<|im_end|>", "<pad>")
TAGS = ("<tool_call>", "</tool_call>")

#: Ids: one per byte, then SPECIAL, then TAGS.
VOCABULARY = 256 + len(SPECIAL) + len(TAGS)

SETTINGS = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "chat_template": TEMPLATE}


def hermes_tokenizer(*, tags_are_tokens: bool = True) -> Tokenizer:
    """One token per byte and, if `tags_are_tokens`, one per tag, which isn't special, as in Qwen's tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    if tags_are_tokens:
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAGS])
    return tokenizer


def write_hermes_tokenizer(folder: Path, *, tags_are_tokens: bool = True) -> None:
    """Writes the tokenizer's files into a base's folder."""
    (folder / "tokenizer.json").write_text(hermes_tokenizer(tags_are_tokens=tags_are_tokens).to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
