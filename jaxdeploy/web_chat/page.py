"""The page: what is where on it, and which part of the dialogue each of its controls moves."""

from __future__ import annotations

import html
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from jaxdeploy.web_chat.dialogue import Dialogue, Manner, Turn, short_name
from jaxdeploy.web_chat.remote_model import RemoteModel

View = tuple[list[dict[str, Any]], Any, str]
"""What a step of the dialogue changes: the messages, the box to type in, the line below."""

DEFAULTS = {"temperature": 0.7, "top_p": 0.8, "top_k": 0, "max_new_tokens": 512, "repetition_penalty": 1.0}
"""Where the controls stand when nothing else was said; the first two and the length are LMDeploy's."""

NEUTRAL = {"top_k": 0, "repetition_penalty": 1.0}
"""Values that are left out of a request: servers of the plain API do not know these fields."""

LATEX = [
    {"left": left, "right": right, "display": display}
    for left, right, display in (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False))
]
"""How formulas are set off; a single dollar is money."""


def page(model: RemoteModel, manner: Manner) -> gr.Blocks:
    """The chat with ``model``. The controls begin with what ``manner`` says."""
    name = short_name(model.name)
    with gr.Blocks(title=f"{name} · jaxdeploy", fill_height=True, analytics_enabled=False) as blocks:
        dialogue = gr.State(Dialogue())
        with gr.Sidebar(label="Settings", width=300, elem_id="settings"):
            gr.HTML(f'<div class="brand">jaxdeploy</div><div class="model">{html.escape(name)}</div>')
            fresh = gr.Button("New chat", elem_id="new-chat", variant="secondary")
            controls = _controls(manner)
        shown = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            container=False,
            layout="bubble",
            scale=1,
            height="100%",
            buttons=["copy"],
            feedback_options=None,
            latex_delimiters=LATEX,
            reasoning_tags=[("<think>", "</think>")],
            placeholder=f"<h2>What is on your mind?</h2><p>{html.escape(name)} answers here.</p>",
        )
        line = gr.HTML(elem_id="figures", padding=False)
        box = gr.Textbox(
            elem_id="box",
            show_label=False,
            container=False,
            placeholder="Type a message; Shift+Enter begins a new line",
            lines=1,
            max_lines=8,
            autofocus=True,
            submit_btn=True,
        )

        async def ask(state: Dialogue, said: str, *values: Any) -> AsyncGenerator[View]:
            if said.strip():
                async with aclosing(_steps(state, state.ask(model, said, _set(manner, values)))) as views:
                    async for view in views:
                        yield view
            else:
                yield _view(state)

        async def again(state: Dialogue, where: gr.RetryData, *values: Any) -> AsyncGenerator[View]:
            steps = state.again(model, turn_at(state.turns, _index(where)), _set(manner, values))
            async with aclosing(_steps(state, steps)) as views:
                async for view in views:
                    yield view

        async def undo(state: Dialogue, where: gr.UndoData) -> View:
            return _view(state, await state.undo(turn_at(state.turns, _index(where))))

        async def clear(state: Dialogue) -> View:
            await state.clear()
            return _view(state, "")

        async def stop(state: Dialogue) -> None:
            await state.stop()

        how: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        view = [shown, box, line]
        box.submit(ask, [dialogue, box, *controls], view, **how)
        shown.retry(again, [dialogue, *controls], view, **how)
        shown.undo(undo, [dialogue], view, **how)
        gr.on([fresh.click, shown.clear], clear, [dialogue], view, **how)
        box.stop(stop, [dialogue], None, queue=False, **how)
    blocks.queue(default_concurrency_limit=None, api_open=False)
    return blocks


def _controls(manner: Manner) -> list[Any]:
    """The system prompt, then one control for each of ``DEFAULTS``."""
    given = {name: getattr(manner.gen_config, name) for name in DEFAULTS}
    at = {name: DEFAULTS[name] if value is None else value for name, value in given.items()}
    return [
        gr.Textbox(manner.system, label="System prompt", lines=3, max_lines=10, placeholder="As the model has it"),
        gr.Slider(0, 2, at["temperature"], step=0.05, label="Temperature", info="0: always the likeliest token"),
        gr.Slider(0.05, 1, at["top_p"], step=0.05, label="Top p"),
        gr.Slider(0, 200, at["top_k"], step=1, label="Top k", info="0: as the server has it"),
        gr.Slider(1, max(4096, at["max_new_tokens"]), at["max_new_tokens"], step=1, label="Longest reply, in tokens"),
        gr.Slider(0.8, 2, at["repetition_penalty"], step=0.05, label="Repetition penalty"),
    ]


def _set(manner: Manner, values: Sequence[Any]) -> Manner:
    """``manner`` with what the controls say."""
    system, *rest = values
    settings = {name: None if value == NEUTRAL.get(name) else value for name, value in zip(DEFAULTS, rest, strict=True)}
    return Manner(system or "", replace(manner.gen_config, **settings))


async def _steps(state: Dialogue, steps: AsyncGenerator[None]) -> AsyncGenerator[View]:
    """The view after each of ``steps``; what was typed is taken at the first."""
    typed: str | None = ""
    async with aclosing(steps):
        async for _ in steps:
            yield _view(state, state.unsent if state.unsent and not state.busy else typed)
            typed = None


def _view(state: Dialogue, typed: str | None = None) -> View:
    """The page as ``state`` has it; ``typed`` replaces what stands in the box."""
    buttons = {"submit_btn": not state.busy, "stop_btn": state.busy}
    box = gr.Textbox(**buttons) if typed is None else gr.Textbox(value=typed, **buttons)
    return [message for turn in state.turns for message in _messages(turn)], box, _line(state)


def _line(state: Dialogue) -> str:
    if state.error:
        return f'<div class="error" role="alert">{html.escape(state.error)}</div>'
    return f"<div>{html.escape(state.figures)}</div>"


def _messages(turn: Turn) -> list[dict[str, Any]]:
    reply = turn.reply
    messages: list[dict[str, Any]] = [{"role": "user", "content": turn.said}]
    if reply.thought:
        status = "done" if reply.text or reply.finish_reason else "pending"
        messages.append(
            {"role": "assistant", "content": reply.thought, "metadata": {"title": "Thoughts", "status": status}}
        )
    if reply.text:
        messages.append({"role": "assistant", "content": reply.text})
    return messages


def turn_at(turns: Sequence[Turn], message: int) -> int:
    """The turn that has the page's ``message``, counted from 0."""
    seen = 0
    for index, turn in enumerate(turns):
        seen += len(_messages(turn))
        if message < seen:
            return index
    return len(turns)


def _index(where: Any) -> int:
    return int(where.index[0] if isinstance(where.index, list | tuple) else where.index)


def theme() -> gr.themes.Base:
    """Quiet greys, fonts that the machine has."""
    system = ["ui-sans-serif", "system-ui", "sans-serif"]
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="zinc",
        radius_size="lg",
        font=system,
        font_mono=["ui-monospace", "monospace"],
    )


CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")

ON_LOAD = "() => { if (innerWidth < 768) document.querySelector('#settings .toggle-button')?.click() }"
"""On a phone the side would cover the chat: it begins closed."""
