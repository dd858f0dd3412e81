"""Tiny language models, tokenizers and data sets for the tests, made on the spot: no hub is needed."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

WORDS = "review of : the acting plot music was felt great dull fine bad . very not film user assistant".split()
TEXTS = []
for aspect in ("acting", "plot"):
    for degree in ("very", "not"):
        TEXTS += [f"the {aspect} was {degree} {adjective} ." for adjective in ("great", "dull", "bad")]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_STYLE = (  # BOS and EOS are in the template
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[{{ m.role }}] {{ m.content }} :{% endif %}{% endfor %}"
)
GPT2_SIZES = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}
LLAMA_SIZES = {**SIZES, "tie_word_embeddings": True}
MISTRAL_SIZES = {**SIZES, "num_key_value_heads": 2}
QWEN3_SIZES = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {  # a class and its arguments, besides the size of the vocabulary
    "gpt2": (GPT2Config, GPT2_SIZES),
    "llama": (LlamaConfig, LLAMA_SIZES),
    "qwen3": (Qwen3Config, QWEN3_SIZES),
    "gpt_neox": (GPTNeoXConfig, SIZES),
    "mistral": (MistralConfig, MISTRAL_SIZES),
}


def word_tokenizer(pad: str | None = "<pad>", eos: str | None = "<eos>", **special: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over WORDS with a ChatML-like template of whole words."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "<bos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token=pad, eos_token=eos, **special
    )
    fast.chat_template = (
        "{% for m in messages %} {{ m.role }} : {{ m.content }} {% if m.role == 'assistant' %}<eos>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %} assistant : {% endif %}"
    )
    return fast


def bpe_tokenizer(bos: bool = False, template: str = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE that merges often, so that a prompt and its completion may share a token where they meet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([*TEXTS, *WORDS, "Question: what? Answer: 42 is right."] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    eos = "<|im_end|>" if template == CHATML else "</s>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token=eos)
    fast.chat_template = template
    return fast


def turns_end_in(end: str, tail: str = "\n") -> str:
    """A chat template whose turns end with `end` and then `tail`."""
    return ("{{ bos_token }}{% for m in messages %}<turn>{{ m.role }} {{ m.content }}" + end + tail + "{% endfor %}"
            "{% if add_generation_prompt %}<turn>assistant {% endif %}")  # fmt: skip


def gemma_like(tail: str = "\n") -> PreTrainedTokenizerFast:
    """Turns end in <|im_end|>, the tokenizer's EOS is another token, and blanks follow the end of a turn."""
    tokenizer = bpe_tokenizer(template=turns_end_in("<|im_end|>", tail))
    tokenizer.eos_token = "</s>"
    return tokenizer


def phi_like() -> PreTrainedTokenizerFast:
    """Turns end in a token without blanks before the next, and EOS, which also pads, is never in a chat."""
    tokenizer = bpe_tokenizer(template=CHATML.replace("<|im_end|>\n", "<|im_end|>"))
    tokenizer.eos_token = tokenizer.pad_token = "</s>"
    return tokenizer


def metaspace() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer whose blanks are ▁, as SentencePiece's."""
    words = ["<pad>", "</s>", "<unk>", "<s>", "<end>", "▁", *[f"▁{word}" for word in WORDS], *WORDS]
    scores = [(word, -1.0 - i / 100) for i, word in enumerate(words)]
    backend = Tokenizer(models.Unigram(scores, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(word, special=True) for word in words[:5]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %} {{ m.content }} <end> {% endfor %}"
    return tokenizer


def wordpiece() -> PreTrainedTokenizerFast:
    """WordPiece as BERT's, which puts [CLS] before and [SEP] after every text."""
    letters = [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = ["[PAD]", "[SEP]", "[UNK]", "[CLS]", *WORDS, *letters]
    vocab = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens([AddedToken(word, special=True) for word in words[:4]])
    ends = [("[CLS]", 3), ("[SEP]", 1)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    tokenizer.chat_template = (
        "[CLS]{% for m in messages %} {{ m.role }} : {{ m.content }}{% if m.role == 'assistant' %} [SEP]{% endif %}"
        "{% endfor %}{% if add_generation_prompt %} assistant : {% endif %}"
    )
    return tokenizer


def appends_eos() -> PreTrainedTokenizerFast:
    """A tokenizer that puts BOS before and EOS after every text, as Llama's with add_eos_token."""
    tokenizer = word_tokenizer(bos_token="<bos>")
    ends = [("<bos>", 3), ("<eos>", 1)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return tokenizer


TOKENIZERS = {  # a function that makes the tokenizer, and the token that ends a turn of its template
    "words": (word_tokenizer, "<eos>"),
    "words, pad is eos": (lambda: word_tokenizer(pad="<eos>"), "<eos>"),
    "appends eos": (appends_eos, "<eos>"),
    "chatml": (bpe_tokenizer, "<|im_end|>"),
    "llama style with bos": (lambda: bpe_tokenizer(bos=True, template=LLAMA_STYLE), "</s>"),
    "turns end in another token": (gemma_like, "<|im_end|>"),
    "and eos follows it": (lambda: gemma_like("\n</s>\n"), "<|im_end|>"),
    "phi style": (phi_like, "<|im_end|>"),
    "metaspace": (metaspace, "<end>"),
    "wordpiece": (wordpiece, "[SEP]"),
}


def make_model(folder: Path, arch: str = "llama", tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 0,
               **config) -> PreTrainedModel:  # fmt: skip
    """A random model of an architecture of CONFIGS and its tokenizer, saved in `folder`; returns the model."""
    tokenizer = tokenizer or word_tokenizer()
    kind, sizes = CONFIGS[arch]
    settings = kind(vocab_size=len(tokenizer), **sizes)
    settings.update({"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, **config})
    settings.bos_token_id = tokenizer.bos_token_id
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    with torch.no_grad():  # wide enough that outputs differ clearly from token to token
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """One JSON object a line; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))
    return path


def completions(rows: int) -> list[dict]:
    """prompt and completion rows of unequal lengths."""
    found = []
    for i in range(rows):
        aspect = WORDS[4 + i % 3]
        sentences = [TEXTS[i % 12]] * (1 + i % 3)
        found.append({"prompt": f"review of {aspect} :", "completion": " " + " ".join(sentences)})
    return found


def preferences(rows: int) -> list[dict]:
    """prompt, chosen and rejected rows of unequal lengths: a positive text is preferred."""
    found = []
    for i in range(rows):
        aspect = WORDS[4 + i % 3]
        prompt = f"review of {aspect} :"
        if i % 2 == 0:
            prompt = f"the film : {prompt}"
        good = [f"the {aspect} was great ."] * (1 + i % 2)
        bad = [f"the {WORDS[5 + i % 2]} felt very dull ."] * (1 + i % 3)
        found.append({"prompt": prompt, "chosen": " " + " ".join(good), "rejected": " " + " ".join(bad)})
    return found


def as_messages(row: dict) -> dict:
    """The conversational form of a row: the prompt a user's message, completions an assistant's."""
    found = {}
    for column, text in row.items():
        role = "user" if column == "prompt" else "assistant"
        found[column] = [{"role": role, "content": text.strip()}]
    return found
