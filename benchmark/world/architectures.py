"""What the language scripts make of tiny random models of many architectures: right numbers, or a refusal.

    python benchmark/run.py architectures                 # a table in Markdown; about two minutes
    python benchmark/run.py architectures llama mamba     # some

Each is saved to a folder and read as --model of rlhf_ppo.py and grpo.py would be. Of those that are accepted,
log-probabilities of a padded batch are compared with those of single rows, and samples of a left-padded batch, from the
cache, with samples of one whole pass per token. "wrong" in the table is a fault of ours.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "algos"))
import rlhf_ppo

V, CPU = 32, torch.device("cpu")
SMALL = {
    "vocab_size": V, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 64, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
HEADS = {"head_dim": 8}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128, "rotary_dim": 4}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, **HEADS}
ARCHITECTURES = {  # by kind: configuration beyond SMALL
    "gpt2": GPT, "gptj": GPT, "codegen": GPT, "gpt_bigcode": GPT, "gpt_neox": {}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "biogpt": {}, "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
    "llama": {}, "qwen2": {}, "qwen3": HEADS, "phi": {}, "phi3": {}, "stablelm": {}, "olmo": {}, "olmo2": {}, "granite": {},
    "cohere": {}, "smollm3": {}, "gemma": HEADS, "starcoder2": {"sliding_window": 4}, "mistral": {"sliding_window": 4},
    "gemma2": HEADS | {"sliding_window": 4}, "gemma3_text": HEADS | {"sliding_window": 4, "sliding_window_pattern": 2},
    "bloom": {"n_head": 4, "n_layer": 2}, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "falcon": {"alibi": True, "new_decoder_architecture": False},
    "mixtral": EXPERTS, "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32}, "qwen3_moe": EXPERTS,
    "mamba": {"state_size": 8}, "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128}, "falcon_mamba": {"state_size": 8},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8},
    "bert": {}, "roberta": {}, "electra": {"embedding_size": 32}, "bart": {"d_model": 32, "decoder_layers": 2,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 64}, "t5": {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64, "d_kv": 8},
    "gemma3": {"text_config": SMALL | HEADS, "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32,
    "num_attention_heads": 4}},
    "llava": {"text_config": SMALL | {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model",
    "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 4}},
}  # fmt: skip
VISION = ("gemma3", "llava")
PROMPTS = [[5], [6, 7, 8, 9, 10, 11], [9, 5, 6]]
RESPONSES = [[7, 8, 9, 1], [4, 5, 1], [8, 8, 8, 8, 8, 8, 9, 1]]


def make(kind: str, folder: Path) -> None:
    """A random model of an architecture, wide enough that outputs differ from token to token, and a tokenizer."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"w{i}" for i in range(V - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "bos_token": "<bos>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = transformers.AutoConfig.for_model(
        kind, **ARCHITECTURES[kind] if kind in VISION else SMALL | ARCHITECTURES[kind]
    )
    torch.manual_seed(0)
    mapping = transformers.AutoModelForCausalLM._model_mapping
    loader = transformers.AutoModelForCausalLM if type(config) in mapping else transformers.AutoModel
    model = loader.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)


@torch.no_grad()
def verdict(folder: Path) -> tuple[str, str, str]:
    """Largest difference of log-probabilities, whether samples agree, and what was said: of a saved model."""
    try:
        model, _ = rlhf_ppo.load_model(transformers.AutoModelForCausalLM, str(folder), 64)
        uniform = torch.rand(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        model.generation_config = transformers.GenerationConfig(eos_token_id=[1], pad_token_id=0)
        if not rlhf_ppo.samples_as_trained(model):
            raise SystemExit("rlhf_ppo, grpo: it samples from other probabilities than one forward pass gives")
    except (SystemExit, Exception) as fault:  # noqa: BLE001 ours, or a library's
        said = " ".join(str(fault).replace(str(folder), "it").split())
        return "–", "–", f"refused: {said[:110]}"
    rows = [list(pair) for pair in zip(PROMPTS, RESPONSES)]
    together, mask = rlhf_ppo.completion_logprobs(model, rows, CPU)
    alone = []
    for row in rows:
        logprobs, is_token = rlhf_ppo.completion_logprobs(model, [row], CPU)
        alone.append(logprobs[is_token])
    apart = (together[mask] - torch.cat(alone)).abs().max().item()
    sampled = rlhf_ppo.sample(model, PROMPTS, uniform)
    same = True
    for prompt, numbers, found in zip(PROMPTS, uniform, sampled):
        expected = []
        while len(expected) < 12 and expected[-1:] != [1]:
            logits = model(torch.tensor([prompt + expected]), use_cache=False).logits[0, -1]
            cumulative = logits.double().softmax(-1).cumsum(-1)
            is_passed = cumulative <= numbers[len(expected)]
            expected.append(is_passed.sum().item())
        same &= found == expected
    return f"{apart:.0e}", "equal" if same else "differ", "accepted" if same and apart < 1e-4 else "WRONG"


def try_all(kinds: list[str]) -> int:
    """Print the table; exit status 1 where one that is accepted is wrong."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(
        "| architecture | log-probabilities, padded against alone | samples from the cache against whole passes | answer |"
    )
    print("|---|---|---|---|")
    wrong = []
    for kind in kinds or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            make(kind, Path(folder))
            found = verdict(Path(folder))
        print(f"| {kind} | {' | '.join(found)} |", flush=True)
        wrong += [kind] * ("WRONG" in found)
    return int(bool(wrong))
