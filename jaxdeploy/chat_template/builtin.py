"""Chat templates by LMDeploy's names, for checkpoints that bring none of their own.

Source of the pieces: the prompt formats that the models' authors published, under the names and in the piece form of
LMDeploy 0.3 to 0.9, with LMDeploy's default system prompts.
"""

from __future__ import annotations

from dataclasses import replace

from jaxdeploy.chat_template import system_prompts
from jaxdeploy.chat_template.pieces import BuiltinTemplate

BASE = BuiltinTemplate()
COMPLETION = BuiltinTemplate(capability="completion")
CHATML = BuiltinTemplate(
    system="<|im_start|>system\n",
    meta_instruction=None,
    eosys="<|im_end|>\n",
    user="<|im_start|>user\n",
    eoh="<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    eoa="<|im_end|>",
    separator="\n",
    stop_words=("<|im_end|>",),
)
INTERNLM = BuiltinTemplate(
    system="<|System|>:",
    meta_instruction=system_prompts.INTERNLM,
    eosys="\n",
    user="<|User|>:",
    eoh="\n",
    assistant="<|Bot|>:",
    eoa="<eoa>",
    separator="\n",
    stop_words=("<eoa>",),
)
VICUNA = BuiltinTemplate(
    meta_instruction=system_prompts.VICUNA,
    eosys=" ",
    user="USER: ",
    eoh=" ",
    assistant="ASSISTANT: ",
    eoa="</s>",
    stop_words=("</s>",),
    prompt_strip=True,
)
LLAMA2 = BuiltinTemplate(
    system="[INST] <<SYS>>\n",
    meta_instruction=system_prompts.LLAMA2,
    eosys="\n<</SYS>>\n\n",
    assistant=" [/INST] ",
    eoa="</s>",
    separator="<s>[INST] ",
)
LLAMA3 = BuiltinTemplate(
    system="<|start_header_id|>system<|end_header_id|>\n\n",
    meta_instruction=None,
    eosys="<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n",
    eoh="<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    eoa="<|eot_id|>",
    stop_words=("<|eot_id|>", "<|end_of_text|>"),
)
ULTRALM = BuiltinTemplate(
    system="User: ",
    meta_instruction=system_prompts.ULTRALM,
    eosys="</s>\n",
    user="User: ",
    eoh="</s>\n",
    assistant="Assistant: ",
    eoa="</s>",
    separator="\n",
    stop_words=("</s>",),
)
SOLAR = BuiltinTemplate(
    system="### System:\n",
    eosys="\n\n",
    user="### User:\n",
    eoh="\n\n",
    assistant="### Assistant:\n",
)
MISTRAL = BuiltinTemplate(user="[INST] ", eoh=" [/INST]", eoa="</s>")
GEMMA = BuiltinTemplate(
    meta_instruction=None,
    user="<start_of_turn>user\n",
    eoh="<end_of_turn>\n",
    assistant="<start_of_turn>model\n",
    eoa="<end_of_turn>\n",
    stop_words=("<end_of_turn>",),
)
DEEPSEEK = BuiltinTemplate(user="User: ", eoh="\n\n", assistant="Assistant: ", eoa="<｜end▁of▁sentence｜>")
DEEPSEEK_CODER = BuiltinTemplate(
    meta_instruction=system_prompts.DEEPSEEK_CODER,
    user="### Instruction:\n",
    eoh="\n",
    assistant="### Response:\n",
    eoa="\n<|EOT|>",
    separator="\n",
    stop_words=("<|EOT|>",),
)
CHATGLM = BuiltinTemplate(
    meta_instruction=None, user="[Round {round}]\n\n问：", eoh="\n\n", assistant="答：", eoa="\n\n"
)
PHI3 = BuiltinTemplate(
    system="<|system|>\n",
    meta_instruction=None,
    eosys="<|end|>\n",
    user="<|user|>\n",
    eoh="<|end|>\n",
    assistant="<|assistant|>\n",
    eoa="<|end|>\n",
    stop_words=("<|end|>", "<|endoftext|>", "<|assistant|>"),
)
INTERNLM2 = replace(CHATML, meta_instruction=system_prompts.INTERNLM, stop_words=("<|im_end|>", "<|action_end|>"))

CHAT_TEMPLATES: dict[str, BuiltinTemplate] = {
    "base": BASE,
    "llama": BASE,
    "falcon": BASE,
    "puyu": BASE,
    "baichuan2": BuiltinTemplate(user="<reserved_106>", assistant="<reserved_107>"),
    "chatglm": CHATGLM,
    "chatml": CHATML,
    "codellama": replace(LLAMA2, meta_instruction=""),
    "dbrx": replace(CHATML, meta_instruction=system_prompts.DBRX),
    "deepseek": DEEPSEEK,
    "deepseek-coder": DEEPSEEK_CODER,
    "gemma": GEMMA,
    "internlm": INTERNLM,
    "internlm2": INTERNLM2,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "llama3_1": replace(LLAMA3, stop_words=(*LLAMA3.stop_words, "<|eom_id|>")),
    "mistral": MISTRAL,
    "mixtral": MISTRAL,
    "phi-3": PHI3,
    "qwen": replace(CHATML, meta_instruction="You are a helpful assistant."),
    "solar": SOLAR,
    "ultracm": ULTRALM,
    "ultralm": ULTRALM,
    "vicuna": VICUNA,
    "wizardlm": VICUNA,
    "yi": replace(CHATML, stop_words=("<|im_end|>", "<|endoftext|>")),
}
"""The names that ``jaxdeploy list`` shows."""

ALIASES = {
    "baichuan-7b": "base",
    "baichuan-base": "base",
    "baichuan2-7b": "baichuan2",
    "baichuan2-chat": "baichuan2",
    "chatglm2": "chatglm",
    "chatglm2-6b": "chatglm",
    "deepseek-chat": "deepseek",
    "internlm-chat": "internlm",
    "internlm-chat-7b": "internlm",
    "internlm-chat-7b-8k": "internlm",
    "internlm-chat-8k": "internlm",
    "internlm-chat-20b": "internlm",
    "internlm2-chat": "internlm2",
    "internlm2-chat-1_8b": "internlm2",
    "internlm2-chat-7b": "internlm2",
    "internlm2-chat-20b": "internlm2",
    "llama-2": "llama2",
    "llama-2-chat": "llama2",
    "mistral-instruct": "mistral",
    "Mistral-7B-Instruct": "mistral",
    "mixtral-instruct": "mixtral",
    "Mixtral-8x7B-Instruct": "mixtral",
    "qwen-chat": "qwen",
    "qwen-7b": "qwen",
    "qwen-14b": "qwen",
    "solar-70b": "solar",
    "yi-chat": "yi",
    "yi-200k": "yi",
    "yi-34b": "yi",
}
"""LMDeploy's older names; understood, not listed."""

COMPLETION_NAMES = ("internlm-20b", "internlm2-1_8b", "internlm2-7b", "internlm2-20b")
"""LMDeploy's names of models without chat training: their prompts are raw text."""

BY_ARCHITECTURE = {
    "BaichuanForCausalLM": "baichuan2",
    "InternLMForCausalLM": "internlm",
    "QWenLMHeadModel": "qwen",
}
"""Families whose chat models bring no template of their own. One without an entry is ``base``."""


def find_builtin(name: str) -> BuiltinTemplate | None:
    """The template of that name, older names included; None for an unknown one."""
    if name in COMPLETION_NAMES:
        return COMPLETION
    return CHAT_TEMPLATES.get(ALIASES.get(name, name))
