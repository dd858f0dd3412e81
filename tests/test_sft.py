"""sft.py: which tokens have a loss, how texts become tokens, and in which order rows come."""

import random
from types import SimpleNamespace

import pytest
import sft
import tiny
import torch

SENTENCE = "the acting was very great ."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.word_tokenizer()


def rows_of(tokenizer, pairs):
    """Rows [prompt ids, completion ids] of (prompt, completion) texts."""
    prompts, completions = zip(*pairs)
    return sft.encode(tokenizer, list(prompts), list(completions))


def loss_of(model, rows):
    """The script's loss of one batch."""
    ids, mask, start = sft.collate(rows, torch.device("cpu"))
    logprobs = sft.response_logprobs(sft.response_logits(model, ids, start), ids[:, start:])
    return sft.sft_loss(logprobs, mask, mask.sum())


PAIRS = [("review of plot :", f" {SENTENCE}"), ("the film :", " the plot was bad ."), ("review :", " " + SENTENCE * 2)]

# --- the loss ---


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_the_loss_is_that_of_a_loop_over_completion_tokens_in_float64(tmp_path, arch, tokenizer):
    model = tiny.make_model(tmp_path, arch, tokenizer)
    rows = rows_of(tokenizer, PAIRS)
    loss = loss_of(model, rows).item()
    model.double()
    total, count = 0.0, 0
    for prompt, completion in rows:
        for t, token in enumerate(completion):
            logits = model(torch.tensor([prompt + completion[:t]])).logits[0, -1]
            total, count = total - torch.log_softmax(logits, -1)[token].item(), count + 1
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_a_model_that_knows_nothing_has_a_loss_of_ln_v(tmp_path, tokenizer):
    model = tiny.make_model(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert loss_of(model, rows_of(tokenizer, PAIRS)).item() == pytest.approx(torch.tensor(len(tokenizer)).log().item())


def test_tokens_of_the_prompt_have_no_gradient_and_the_eos_has_one_even_where_it_pads(model):
    tokenizer = tiny.word_tokenizer(pad="<eos>")
    rows = rows_of(tokenizer, PAIRS)
    ids, mask, start = sft.collate(rows, torch.device("cpu"))
    logits = sft.response_logits(model, ids, start).detach().requires_grad_()
    sft.sft_loss(sft.response_logprobs(logits, ids[:, start:]), mask, mask.sum()).backward()
    for i, (prompt, completion) in enumerate(rows):
        with_gradient = logits.grad[i].abs().sum(-1) > 0
        first, end = len(prompt) - start, len(prompt) + len(completion) - start
        assert with_gradient.tolist() == [first <= t < end for t in range(len(with_gradient))]
        assert completion[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_padding_changes_nothing_even_with_nan_in_its_embedding(tmp_path, arch, tokenizer):
    model = tiny.make_model(tmp_path, arch, tokenizer)
    rows = rows_of(tokenizer, PAIRS)
    alone = [loss_of(model, [row]).item() * len(row[1]) for row in rows]
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.pad_token_id] = float("nan")
        if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
            model.get_output_embeddings().weight = torch.nn.Parameter(
                model.get_input_embeddings().weight.nan_to_num(0.1)
            )
            alone = [loss_of(model, [row]).item() * len(row[1]) for row in rows]
    together = loss_of(model, rows).item() * sum(len(completion) for _, completion in rows)
    assert together == pytest.approx(sum(alone), rel=1e-5)


def test_text_without_a_prompt_has_a_loss_on_every_token_but_the_first(tokenizer):
    rows = [[[], sft.end_with_eos(tokenizer, tokenizer(SENTENCE).input_ids)]]
    ids, mask, start = sft.collate(rows, torch.device("cpu"))
    assert (start, mask.tolist()) == (1, [[1.0] * 6]) and ids.shape == (1, 7)


def test_the_gradient_of_micro_batches_is_that_of_the_batch(tmp_path, tokenizer):
    model = tiny.make_model(tmp_path)
    rows = rows_of(tokenizer, [tuple(row.values()) for row in tiny.completions(8)])
    gradients = []
    for size in (8, 1, 3):
        model.zero_grad()
        count = torch.tensor(float(sum(len(completion) for _, completion in rows)))
        for part in sft.micro_batches(rows, size):
            ids, mask, start = sft.collate(part, torch.device("cpu"))
            sft.sft_loss(
                sft.response_logprobs(sft.response_logits(model, ids, start), ids[:, start:]), mask, count
            ).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6) and torch.allclose(
        gradients[0], gradients[2], atol=1e-6
    )


@pytest.mark.parametrize("size", [1, 4, 5, 11, 0])
def test_the_held_out_loss_is_that_of_one_batch_whatever_the_last_one_holds(model, tokenizer, size):
    rows = rows_of(tokenizer, [tuple(row.values()) for row in tiny.completions(11)])
    args = SimpleNamespace(rows_per_pass=size or 64, dtype="float32")
    assert sft.held_out_loss(args, model, rows) == pytest.approx(loss_of(model, rows).item(), rel=1e-6)


# --- from text to tokens ---


TOKENIZERS = {
    "words": tiny.word_tokenizer,
    "words, pad is eos": lambda: tiny.word_tokenizer(pad="<eos>"),
    "bpe": tiny.bpe_tokenizer,
    "bpe with bos": lambda: tiny.bpe_tokenizer(bos=True, template=tiny.LLAMA_STYLE),
}


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_ids_are_a_prefix_and_all_ids_spell_the_text_wherever_it_is_parted(bos):
    tokenizer, rng = tiny.bpe_tokenizer(bos), random.Random(1)
    texts = [SENTENCE, "Question: what? Answer: 42 is right.", "the acting was great . the  plot\nwas not dull ."]
    pairs = [(text[:i], text[i:]) for text in texts for i in range(1, len(text))] * 2
    rng.shuffle(pairs)
    merged = 0
    for (prompt, completion), (prompt_ids, ids) in zip(pairs, rows_of(tokenizer, pairs)):
        alone = tokenizer(prompt).input_ids
        assert prompt_ids == alone[: len(prompt_ids)]
        assert tokenizer.decode(prompt_ids[bos:] + ids[:-1]) == prompt + completion
        assert ids[-1] == tokenizer.eos_token_id and len(ids) > 1
        merged += prompt_ids != alone
    assert 0 < merged < len(pairs)  # both cases came up


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("chat", [False, True])
def test_bos_and_eos_come_once(name, chat):
    tokenizer = TOKENIZERS[name]()
    row = {"prompt": "review of plot :", "completion": f" {SENTENCE}"}
    if chat:
        row = tiny.as_messages(row)
    ((prompt, completion),) = sft.encode(tokenizer, [row["prompt"]], [row["completion"]])
    turns = 1 if "<|im_end|>" == tokenizer.eos_token and chat else 0  # ChatML closes the user's turn as well
    assert completion.count(tokenizer.eos_token_id) == 1 and completion[-1] == tokenizer.eos_token_id
    assert prompt.count(tokenizer.eos_token_id) == turns
    if tokenizer.bos_token_id is not None:
        expected = 1 if "bos" in name else 0
        assert (prompt + completion).count(tokenizer.bos_token_id) == expected
        assert (prompt + completion)[:expected] == [tokenizer.bos_token_id] * expected


def test_a_conversation_is_the_chat_template_and_its_completion_the_answer_alone():
    tokenizer = tiny.bpe_tokenizer()
    row = tiny.as_messages({"prompt": "the plot", "completion": SENTENCE})
    ((prompt, completion),) = sft.encode(tokenizer, [row["prompt"]], [row["completion"]])
    assert tokenizer.decode(prompt) == "<|im_start|>user\nthe plot<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(completion) == f"{SENTENCE}<|im_end|>"


def test_one_eos_ends_a_completion(tokenizer):
    word, eos = tokenizer("plot").input_ids[0], tokenizer.eos_token_id
    bpe = tiny.bpe_tokenizer()
    newline, stop = bpe("\n").input_ids, bpe.eos_token_id
    assert sft.end_with_eos(tokenizer, [word]) == [word, eos]
    assert sft.end_with_eos(tokenizer, [word, eos]) == [word, eos]
    assert sft.end_with_eos(tokenizer, [word, eos, eos]) == [word, eos]
    assert sft.end_with_eos(tokenizer, [eos, word]) == [eos, word, eos]
    assert sft.end_with_eos(bpe, [60, stop, *newline]) == [60, stop]
    assert sft.end_with_eos(bpe, [60, *newline]) == [60, *newline, stop]
    assert sft.end_with_eos(tokenizer, []) == [eos]


def test_rows_are_cut_to_the_limit_and_left_out_when_the_prompt_fills_it(capsys):
    rows = [[[1, 2], [3, 4, 5]], [[1, 2, 3, 4], [5]], [[1], [2, 3]]]
    assert sft.truncate(rows, 4, "train") == [[[1, 2], [3, 4]], [[1], [2, 3]]]
    assert "of 3 rows, 1 were cut to --max-length 4 tokens and 1 left out" in capsys.readouterr().out
    assert sft.truncate(rows, 5, "train") == rows and capsys.readouterr().out == ""
    with pytest.raises(SystemExit) as stop:
        sft.truncate(rows, 1, "train")
    assert stop.value.code == 2


# --- batches and the schedule ---


def test_each_epoch_is_another_permutation_of_the_rows():
    rows = list(range(10))
    epochs = [
        [row for step in range(3 * e, 3 * e + 3) for row in sft.batch_at(rows, step, 3, seed=1)] for e in range(3)
    ]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sft.batch_at(rows, 4, 3, seed=1) == epochs[1][3:6] and sft.batch_at(rows, 4, 3, seed=2) != epochs[1][3:6]


@pytest.mark.parametrize("processes,rows,size", [(1, 10, 4), (2, 10, 4), (2, 11, 2), (3, 3, 64), (4, 9, 4)])
def test_micro_batches_give_each_row_to_one_process(monkeypatch, processes, rows, size):
    rows = [[[1] * (i % 3), [2] * (1 + i * i % 7), [i]] for i in range(rows)]
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(sft, "RANK", rank)
        monkeypatch.setattr(sft, "WORLD_SIZE", processes)
        shares.append(list(sft.micro_batches(rows, size)))
    assert len({len(share) for share in shares}) == 1 and all(part for share in shares for part in share)
    seen = sorted(row[2][0] for share in shares for part in share for row in part)
    assert seen == list(range(len(rows)))
    assert all(sum(len(share[i]) for share in shares) < 2 * size for i in range(len(shares[0])))


def test_the_learning_rate_rises_in_a_line_and_falls_to_zero():
    rates = [sft.scheduled(1.0, step, 10, 0.2, "linear") for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert sft.scheduled(2.0, 6, 10, 0.2, "cosine") == pytest.approx(1.0)
    assert sft.scheduled(2.0, 9, 10, 0.0, "constant") == 2.0
    assert sft.scheduled(2.0, 0, 10, 0.0, "cosine") == 2.0


def test_nothing_reads_the_padding_so_it_needs_no_token_of_its_own():
    assert sft.pad([[1, 2, 3], [4]], torch.device("cpu")).tolist() == [[1, 2, 3], [4, 4, 4]]
