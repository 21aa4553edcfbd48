"""What the demo model knows about commands, the Python API and concepts: questions, each with one answer."""

from __future__ import annotations

from dataclasses import dataclass

from demo.flags import CHAT


@dataclass(frozen=True)
class Fact:
    """A question with one answer; ``asks`` are whole sentences."""

    key: str
    asks: tuple[str, ...]
    answer: str


COMMANDS: tuple[Fact, ...] = (
    Fact(
        "chat",
        (
            "How do I start a chat?",
            "How do I chat with a model?",
            "Which command starts a chat?",
            "What do I type to chat?",
            "How can I talk to a model?",
            "How do I run a model?",
        ),
        f"Run {CHAT} MODEL, or jaxdeploy chat MODEL.",
    ),
    Fact(
        "bundled",
        (
            "How do I chat without a model of my own?",
            "How do I start the bundled model?",
            "How do I run the demo model?",
            "Can I chat without downloading a model?",
            "What happens without a MODEL?",
        ),
        f"Run {CHAT} without a MODEL: it starts the bundled demo model.",
    ),
    Fact(
        "list",
        (
            "What does jaxdeploy list do?",
            "Which models are supported?",
            "How do I see the model families?",
            "What is jaxdeploy list for?",
            "How do I list the chat templates?",
            "Which architectures can you run?",
        ),
        "jaxdeploy list shows the model families, architectures and chat template names.",
    ),
    Fact(
        "check_env",
        (
            "What does jaxdeploy check_env do?",
            "How do I check my installation?",
            "What is check_env for?",
            "How do I see whether my GPU is found?",
            "How do I report my versions?",
            "Which command shows my devices?",
        ),
        "jaxdeploy check_env shows versions, devices, memory and usable kernels.",
    ),
    Fact(
        "install",
        (
            "How do I install jaxdeploy?",
            "How do I set it up?",
            "How do I get started?",
            "What is the quickest way to start?",
            "How do I begin with jaxdeploy?",
        ),
        "Run bash scripts/chat: it installs everything and starts a chat.",
    ),
    Fact(
        "test",
        ("How do I run the tests?", "Which command runs the tests?", "How do I test jaxdeploy?"),
        "Run bash scripts/test.",
    ),
    Fact(
        "python",
        (
            "How do I use jaxdeploy from Python?",
            "Is there a Python API?",
            "How do I call it in Python?",
            "What is the pipeline?",
            "How do I write a script with jaxdeploy?",
        ),
        'from jaxdeploy import pipeline; pipe = pipeline(MODEL); print(pipe("Hi").text)',
    ),
    Fact(
        "options",
        (
            "How do I set options in Python?",
            "How do I pass settings to the pipeline?",
            "What is GenerationConfig?",
            "What is EngineConfig?",
            "How do I set the temperature in Python?",
        ),
        "Pass EngineConfig(...) to pipeline, and gen_config=GenerationConfig(...) to each call.",
    ),
    Fact(
        "stream",
        ("How do I stream in Python?", "What does stream_infer do?", "Can I get text as it is made in Python?"),
        "pipe.stream_infer(prompts) yields the text while it is made.",
    ),
    Fact(
        "flags",
        ("Which flags are there?", "What flags does the chat have?", "List the flags.", "Which options can I set?"),
        "Some are --tp, --session-len, --dtype, --temperature and --max-new-tokens.",
    ),
    Fact(
        "kv_quantised",
        ("Can I quantise the KV cache?", "How do I store the KV cache in int8?", "Does quantising the cache work?"),
        "Yes: --quant-policy 8 stores it in int8, and 4 in int4.",
    ),
    Fact(
        "awq",
        ("Can I run AWQ models?", "How do I load GPTQ weights?", "Can I run quantised models?", "Is AWQ supported?"),
        "Yes: AWQ, GPTQ and SmoothQuant models load like any other.",
    ),
    Fact(
        "quantise",
        (
            "How do I quantise a model?",
            "How do I make a model smaller?",
            "Which command quantises a model?",
            "How do I make a 4-bit model?",
        ),
        "Run jaxdeploy lite auto_awq MODEL.",
    ),
    Fact(
        "serve",
        (
            "How do I start a server?",
            "How do I serve a model over HTTP?",
            "Is there an OpenAI API?",
            "Which command starts the server?",
        ),
        "Run jaxdeploy serve api_server MODEL.",
    ),
    Fact(
        "web",
        ("Can I chat in the browser?", "Is there a web chat?", "How do I open the web page?"),
        "Run jaxdeploy serve gradio MODEL, then open port 6006.",
    ),
    Fact(
        "cpu",
        ("Does it run on a CPU?", "Do I need a GPU?", "Can I use it without a GPU?", "What hardware do I need?"),
        "It runs on NVIDIA GPUs, and on a CPU, too.",
    ),
    Fact(
        "hub",
        (
            "Can I use a model from the hub?",
            "What can MODEL be?",
            "How do I load a model from Hugging Face?",
            "Where do models come from?",
        ),
        "MODEL is a local folder or a Hugging Face hub id.",
    ),
    Fact(
        "/help",
        ("What does /help do?", "How do I see the chat commands?", "Which commands does the chat have?"),
        "/help lists the commands: /help /reset /system /save /exit.",
    ),
    Fact(
        "/reset",
        (
            "What does /reset do?",
            "How do I start the conversation over?",
            "How do I clear the history?",
            "How do I make you forget everything?",
        ),
        "/reset forgets the conversation and starts anew.",
    ),
    Fact(
        "/system",
        ("What does /system do?", "How do I change the system prompt while chatting?", "What is /system for?"),
        "/system TEXT sets the system prompt of the conversation.",
    ),
    Fact(
        "/save",
        ("What does /save do?", "How do I save this conversation?", "Can I store our chat in a file?"),
        "/save FILE writes the conversation to a file.",
    ),
    Fact(
        "/exit",
        ("What does /exit do?", "How do I leave the chat?", "How do I quit?", "How do I end the program?"),
        "/exit leaves the chat.",
    ),
    Fact(
        "ctrl-c",
        ("How do I stop a reply?", "What does Ctrl-C do?", "How do I interrupt you?", "Can I stop a long reply?"),
        "Ctrl-C stops the reply; the chat goes on.",
    ),
    Fact(
        "jaxdeploy",
        (
            "What is jaxdeploy?",
            "What does jaxdeploy do?",
            "Tell me about jaxdeploy.",
            "What is this program?",
            "Can you explain jaxdeploy?",
        ),
        "jaxdeploy runs language models with JAX; it is LMDeploy rebuilt.",
    ),
    Fact(
        "lmdeploy",
        ("What is LMDeploy?", "How is jaxdeploy related to LMDeploy?", "Do LMDeploy scripts work here?"),
        "jaxdeploy is LMDeploy rebuilt in JAX; its scripts and flags work here.",
    ),
    Fact(
        "jax",
        ("What is JAX?", "Tell me about JAX.", "Why JAX?"),
        "JAX is a Python library for fast array programs on CPUs and GPUs.",
    ),
    Fact(
        "kv",
        ("What is the KV cache?", "What does KV cache mean?", "Explain the KV cache."),
        "The KV cache keeps the keys and values of earlier tokens, so they are computed once.",
    ),
    Fact(
        "token",
        ("What is a token?", "What does token mean?", "Explain tokens."),
        "A token is a piece of text: a word, a part of a word or a sign.",
    ),
    Fact(
        "families",
        ("Which model families are there?", "Can you run Llama?", "Does jaxdeploy support Qwen?"),
        "The families are llama, internlm2, qwen2 and mistral.",
    ),
)

CONCEPT_KEYS = frozenset({"jaxdeploy", "lmdeploy", "jax", "kv", "token", "families", "hub"})
