"""``jaxdeploy list``: what can be loaded."""

from __future__ import annotations

from jaxdeploy.cli.flags import Namespace, Parser


def add_arguments(parser: Parser) -> None:
    """No flags."""


def run(args: Namespace) -> int:
    """Print families with their architectures, then the names of the chat templates."""
    from jaxdeploy.chat_template import CHAT_TEMPLATES
    from jaxdeploy.models.registry import FAMILIES

    by_family: dict[str, list[str]] = {}
    for architecture, module in FAMILIES.items():
        by_family.setdefault(module.rpartition(".")[2], []).append(architecture)
    print("Model families, and the architectures in config.json that belong to them:")
    for family, architectures in sorted(by_family.items()):
        print(f"  {family:<12} {' '.join(architectures)}")
    print("\nChat templates (--chat-template NAME; without it the checkpoint's own):")
    for name in sorted(CHAT_TEMPLATES):
        print(f"  {name}")
    return 0
