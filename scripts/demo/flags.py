"""What the demo model knows about the flags of the chat command, and the ways to ask for it.

Tables only. Answers are single short sentences, because a model of three million parameters learns them by heart.
"""

from __future__ import annotations

from dataclasses import dataclass

CHAT = "python -m jaxdeploy.chat"


@dataclass(frozen=True)
class Flag:
    """One flag of the chat command: ``meaning`` and ``default`` are the answers, ``tasks`` are ways to want it."""

    name: str
    meaning: str
    default: str
    values: tuple[str, ...]
    tasks: tuple[str, ...] = ()


FLAGS: tuple[Flag, ...] = (
    Flag(
        "--session-len",
        "the number of tokens that a conversation may hold, prompt and replies together",
        "what the model allows, at most 8192",
        ("1024", "2048", "4096", "8192", "16384"),
        ("allow longer conversations", "set the context length", "make the context larger", "keep a longer history"),
    ),
    Flag(
        "--tp",
        "the number of GPUs that the model is split over",
        "1",
        ("2", "4", "8"),
        ("use several GPUs", "split the model over GPUs", "run on more than one GPU", "turn on tensor parallelism"),
    ),
    Flag(
        "--cache-max-entry-count",
        "the fraction of free GPU memory that the KV cache takes",
        "0.8",
        ("0.2", "0.4", "0.5", "0.6", "0.9"),
        ("use less GPU memory", "shrink the KV cache", "give the cache less memory", "leave memory to other programs"),
    ),
    Flag(
        "--quant-policy",
        "how the KV cache is stored: 0 as it is, 8 in int8, 4 in int4",
        "0",
        ("0", "4", "8"),
        ("store the KV cache in int8", "quantise the KV cache", "halve the KV cache", "fit more tokens in the cache"),
    ),
    Flag(
        "--backend",
        "LMDeploy's choice of engine; it is accepted, and jaxdeploy has one engine",
        "turbomind",
        ("turbomind", "pytorch"),
        ("choose the backend", "pick an engine", "select the backend"),
    ),
    Flag(
        "--model-format",
        "the layout of the checkpoint on disk: hf, llama for Meta's own, or awq or gptq",
        "to look at the files",
        ("llama", "hf", "awq", "gptq"),
        ("load a checkpoint in Meta's layout", "load Meta's files", "say which layout the weights have"),
    ),
    Flag(
        "--dtype",
        "the number type of the weights: auto, float32, bfloat16 or float16",
        "auto",
        ("float32", "bfloat16", "float16", "auto"),
        ("run in half precision", "choose the precision", "change the number type", "compute in another precision"),
    ),
    Flag(
        "--config",
        "a YAML file that holds the other flags",
        "none",
        ("chat.yaml", "my.yaml", "engine.yaml"),
        ("keep my flags in a file", "read the settings from a file", "use a YAML file", "load flags from YAML"),
    ),
    Flag(
        "--meta-instruction",
        "the system prompt of the conversation",
        "the template's own",
        ('"Be brief."', '"Be kind."', '"You are a pirate."'),
        ("set a system prompt", "give the model an instruction for the whole chat", "change the system message"),
    ),
    Flag(
        "--chat-template",
        "the chat template: a name, or LMDeploy's JSON file",
        "the checkpoint's own",
        ("internlm2", "llama2", "qwen", "my.json"),
        ("choose another chat template", "change the template", "use my own chat template", "override the template"),
    ),
    Flag(
        "--cap",
        "what the model is asked for: chat, completion, infilling or python",
        "chat",
        ("chat", "completion", "infilling", "python"),
        ("continue raw text", "complete text without a template", "use a base model", "get plain completion"),
    ),
    Flag(
        "--max-new-tokens",
        "the most tokens that one reply may have",
        "512",
        ("32", "64", "100", "128", "256", "1024"),
        (
            "limit the length of a reply",
            "get shorter replies",
            "stop replies from getting long",
            "cap the reply length",
        ),
    ),
    Flag(
        "--temperature",
        "how freely tokens are chosen: 0 is greedy, higher is more random",
        "the checkpoint's own",
        ("0", "0.2", "0.5", "0.7", "0.8", "1.0"),
        (
            "get the same reply every time",
            "make replies more random",
            "make the model more creative",
            "decode greedily",
        ),
    ),
    Flag(
        "--top-p",
        "the probability mass that sampling keeps",
        "the checkpoint's own",
        ("0.5", "0.8", "0.9", "0.95"),
        ("use nucleus sampling", "cut off unlikely tokens", "sample from the nucleus"),
    ),
    Flag(
        "--top-k",
        "the number of likely tokens that sampling chooses from",
        "the checkpoint's own",
        ("1", "10", "20", "40", "50"),
        ("sample from the most likely tokens only", "keep only the k best tokens", "limit the candidates of sampling"),
    ),
    Flag(
        "--prompt",
        "a text that is answered once; then the program exits",
        "none, so it chats",
        ('"Hello"', '"Tell me a joke"', '"What is JAX?"'),
        (
            "ask one question from a script",
            "get one answer and exit",
            "use it without a dialogue",
            "run a single prompt",
        ),
    ),
    Flag(
        "--max-batch-size",
        "the number of sequences that run at once",
        "128 on a GPU and 8 on a CPU",
        ("1", "4", "16", "32", "64"),
        ("run more sequences at once", "change the batch size", "limit the batch"),
    ),
    Flag(
        "--block-size",
        "the number of tokens in one block of the KV cache",
        "64",
        ("16", "32", "64", "128"),
        ("change the size of cache blocks", "use smaller KV blocks", "make the blocks of the cache larger"),
    ),
    Flag(
        "--random-seed",
        "a number that makes random replies repeatable",
        "another one each time",
        ("1", "7", "42", "123"),
        ("repeat a random reply", "make sampling repeatable", "fix the seed"),
    ),
    Flag(
        "--repetition-penalty",
        "how much tokens that were said before are held back; 1.0 is not at all",
        "the checkpoint's own",
        ("1.05", "1.1", "1.2"),
        ("stop the model from repeating itself", "get less repetition", "punish repeated words"),
    ),
    Flag(
        "--load-format",
        "where the weights come from: auto reads them, dummy makes random ones",
        "auto",
        ("auto", "dummy"),
        ("benchmark without weights", "try a shape with random weights", "start with dummy weights"),
    ),
    Flag(
        "--download-dir",
        "the folder that models from the hub are stored in",
        "the hub's cache",
        ("/data/models", "./models", "/tmp/hub"),
        ("store downloads elsewhere", "choose the download folder", "put hub models in another folder"),
    ),
    Flag(
        "--revision",
        "the branch, tag or commit of a model on the hub",
        "main",
        ("main", "v1.0", "dev"),
        ("load another branch of a model", "pin a model to a commit", "choose a model version on the hub"),
    ),
)
