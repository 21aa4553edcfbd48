"""Messages to the text that a model was trained on."""

from jaxdeploy.chat_template.builtin import CHAT_TEMPLATES
from jaxdeploy.chat_template.pieces import BuiltinTemplate
from jaxdeploy.chat_template.template import ChatTemplate

__all__ = ["CHAT_TEMPLATES", "BuiltinTemplate", "ChatTemplate"]
