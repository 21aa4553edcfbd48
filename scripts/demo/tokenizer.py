"""The demo model's own tokenizer (byte-level BPE, digits one by one), its chat template, and dialogues as token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from demo.dialogues import Dialogue
from jaxdeploy.files.atomic import put_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN, BOS, EOS, IM_START, IM_END = "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (UNKNOWN, BOS, EOS, IM_START, IM_END)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(dialogues: Iterable[Dialogue], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of ``vocab_size`` tokens; every digit is a token, so that numbers are spelt one way only."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{message['role']}\n{message['content']}\n" for d in dialogues for message in d.messages())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> None:
    """``tokenizer.json`` and ``tokenizer_config.json`` as Hugging Face transformers reads them."""
    put_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": IM_END,
        "unk_token": UNKNOWN,
        "pad_token": EOS,
        "additional_special_tokens": [IM_START, IM_END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    put_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def encode_dialogue(tokenizer: Tokenizer, dialogue: Dialogue) -> tuple[list[int], list[int]]:
    """Token ids of a dialogue from ``<s>`` on, and for each token the reply it belongs to (from 1 on), else 0.

    A reply is its text and the ``<|im_end|>`` that stops it.
    """
    ids, owner = _encode(tokenizer, BOS), [0]
    replies = 0
    for message in dialogue.messages():
        head = _encode(tokenizer, f"{IM_START}{message['role']}\n")
        body = _encode(tokenizer, message["content"] + IM_END)
        is_reply = message["role"] == "assistant"
        replies += is_reply
        tail = _encode(tokenizer, "\n")
        ids += head + body + tail
        owner += [0] * len(head) + [replies if is_reply else 0] * len(body) + [0] * len(tail)
    return ids, owner


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that :func:`save_tokenizer` wrote."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))
