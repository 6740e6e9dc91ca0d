"""Chat templates in Hugging Face's dialect of Jinja: finds and renders them, and detects what they support."""

from loramill.data.chat_template.files import read_templates, templates_by_name
from loramill.data.chat_template.template import ChatTemplate

__all__ = ["ChatTemplate", "read_templates", "templates_by_name"]
