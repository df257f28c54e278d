"""Train the bundled model from scratch: a 1.2M-parameter Llama that solves running sums and over-thinks like R1.

    python examples/pretrain_tiny.py --output sbtiny/assets/tiny        (half an hour to an hour on 2 cores; seeded)

Its documents, all generated here and only from problems of the train split:
- *traces*: a pass works the sum out line by line; further passes check it, a log-normal number of times (mean about 5 passes, one pass in a
  tenth of the traces). Seven lines in a thousand hold a slip; passes go on until the last two agree. One pass in eight is *quick*: two
  steps a line. It is a third as long and harder, because each line does two sums.
- *opened traces*: two answers in five begin with untrained text: a few words, some tags (`<price>375</price><note>`). Without it
  the model looks the first step up at a fixed distance, and any text before the solution, such as a budget, breaks it. A real checkpoint
  knows every distance.
- *numbers*: short markup (`<price>375</price>`), counting, ordering, a word repeated N times. They teach tags, the size of numbers up to
  999 and repetition, which any real checkpoint knows. They are few in the first stage and a third of the documents in the second. No trace
  holds a budget: a number in an opening is unrelated to the text after it.

It over-thinks by construction; the rest of the toolkit is there to correct that.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sbtiny.tasks import arithmetic
from sbtiny.tasks.arithmetic import LABELS, Problem

SLIP, QUICK, OPENED = 0.007, 0.12, 0.4
Document = tuple[str, str, str]  # user turn, opening of the answer (not trained on), rest of the answer
AGAIN = ("Wait, check.", "Hmm, again.", "Let me check.", "Once more.", "Wait, again.", "Is that right?")
NUMBERS = ("coins", "price", "count", "page", "day")  # tags around a number, as a budget is
WORDS = ("name", "item", "title", "note", "list")
WORDS_BEFORE = ("Okay.", "Sure.", "Let us see.", "Here it is:", "Solution:")
TAGS = (*NUMBERS, *WORDS, "budget", "solution")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The pre-tokenizer of Llama 3, which llama.cpp knows as "llama-bpe": words, runs of punctuation, numbers of up to three digits.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def one_pass(problem: Problem, rng: random.Random, quick: bool) -> tuple[str, int]:
    """Write one pass over the steps; returns it and its result: `a)-8=25` a line, or `ab)=30` for two steps at once."""
    value, lines, at = problem.start, [], 0
    while at < len(problem.steps):
        width = 2 if quick and at + 1 < len(problem.steps) else 1
        value = (value + sum(problem.steps[at : at + width])) % 100
        if rng.random() < SLIP:
            value = (value + rng.choice((-10, -2, -1, 1, 2, 10))) % 100
        shown = f"{problem.steps[at]:+d}" if width == 1 else ""
        lines.append(f"{LABELS[at : at + width]}){shown}={value}\n")
        at += width
    return "".join(lines), value


def trace(problem: Problem, rng: random.Random) -> str:
    """Write the over-thinking solution of a problem: at least the drawn number of passes, until the last two agree."""
    wanted = 1 if rng.random() < 0.1 else min(14, 1 + max(1, round(rng.lognormvariate(1.3, 0.6))))
    text, value = one_pass(problem, rng, rng.random() < QUICK)
    done, agree = 1, True
    while done < wanted or not agree:
        more, new = one_pass(problem, rng, rng.random() < QUICK)
        text += f"{rng.choice(AGAIN)}\n{more}"
        agree, value, done = new == value, new, done + 1
    return text + f"\\boxed{{{value}}}"


def field(tag: str, rng: random.Random) -> str:
    return f"<{tag}>{rng.choice(arithmetic.NAMES + arithmetic.NOUNS) if tag in WORDS else rng.randint(1, 999)}</{tag}>"


def record(rng: random.Random) -> Document:
    """Write a line of markup: tags, names and numbers up to 999."""
    tags = rng.sample(TAGS, rng.randint(1, 4))
    return "Write a record: " + ", ".join(tags), "", "".join(field(tag, rng) for tag in tags)


def opened(problem: Problem, rng: random.Random) -> Document:
    """Write a trace after an opening that is not trained on."""
    words = rng.choice(WORDS_BEFORE) + rng.choice((" ", "\n")) if rng.random() < 0.3 else ""
    last = rng.choice(("", "solution", "solution", *WORDS))
    tags = [tag for tag in rng.sample((*NUMBERS, *WORDS), rng.choice((0, 1, 1, 2, 3))) if tag != last]
    before = words + "".join(field(tag, rng) for tag in tags) + (f"<{last}>" if last else "")
    return problem.tell(rng), before, trace(problem, rng) + (f"</{last}>" if last else "")


def counting(rng: random.Random) -> Document:
    """Write numbers in order, so that their embeddings know their order."""
    start, step = rng.randint(0, 940), rng.choice((1, 1, 2, 3, 5, 10, -1, -2, -10))
    numbers = [n for n in range(start, start + 10 * step, step) if 0 <= n <= 999]
    return f"Count from {start} by {step}.", "", ",".join(map(str, numbers))


def ordering(rng: random.Random) -> Document:
    """Ask for numbers in order, so that their embeddings know their size."""
    numbers = [min(999, max(1, round(math.exp(rng.uniform(0, math.log(1000)))))) for _ in range(rng.randint(2, 6))]
    return f"Order {', '.join(map(str, numbers))}.", "", ",".join(map(str, sorted(numbers)))


def repeating(rng: random.Random) -> Document:
    """Ask for a word N times, so that a number can mean an amount of text."""
    times, noun = round(math.exp(rng.uniform(0, math.log(120)))), rng.choice(arithmetic.NOUNS)
    return f"Write {noun} {times} times.", "", " ".join([noun] * times)


def documents(seed: int, numbers: float) -> Iterator[Document]:
    """Draw documents without end: traces, two in five opened. One about numbers follows each with probability `numbers`."""
    rng = random.Random(seed)
    for problem in arithmetic.draw_problems("train", rng):
        yield opened(problem, rng) if rng.random() < OPENED else (problem.tell(rng), "", trace(problem, rng))
        if rng.random() < numbers:
            yield rng.choice(NUMERACY if numbers > 0.5 else (record, counting))(rng)


NUMERACY = (record, record, counting, ordering, repeating)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the words of the traces and every number up to 999."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    stream = documents(0, 0.08)
    corpus = [part for _ in range(3000) for part in next(stream)] + ["user\n", "assistant\n", "system\n"] * 3
    corpus += [f"<{tag}>7</{tag}><solution>a" for tag in TAGS] + [str(n) for n in range(1000)] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=1536,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token=None,
        model_max_length=2048,
    )
    fast.chat_template = TEMPLATE
    return fast


def build_model(vocab: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, user: str, before: str, rest: str) -> tuple[list[int], int]:
    """Encode a conversation; returns its ids and the count of untrained ones: the prompt and the opening."""
    prompt = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    head, opening, body = tokenizer([prompt, before, rest + "<|im_end|>"], add_special_tokens=False)["input_ids"]
    return head + opening + body, len(head) + len(opening)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, tokens: int, numbers: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Draw rows of similar length, about `tokens` a batch: ids and labels, both (rows, longest), labels -100 where not trained."""
    stream, rng = documents(seed, numbers), random.Random(seed)
    while True:
        rows = sorted((encode(tokenizer, *next(stream)) for _ in range(1024)), key=lambda row: len(row[0]))
        groups, start = [], 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or len(rows[end][0]) * (end - start + 1) > tokens:
                groups.append(rows[start:end])
                start = end
        rng.shuffle(groups)
        for group in groups:
            ids = torch.zeros(len(group), len(group[-1][0]), dtype=torch.long)
            labels = torch.full_like(ids, -100)
            for i, (row, prompt) in enumerate(group):
                ids[i, : len(row)] = torch.tensor(row)
                labels[i, prompt : len(row)] = ids[i, prompt : len(row)]
            yield ids, labels


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


@dataclass(frozen=True)
class Stage:
    """A stage of training: trained tokens, learning rate (falls to 0), documents about numbers for each trace, seed."""

    tokens: int
    lr: float
    numbers: float
    seed: int


STAGES = (Stage(14_000_000, 4e-3, 0.08, 0), Stage(1_500_000, 2e-3, 0.6, 1))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stage: Stage, args: argparse.Namespace) -> None:
    console, started, seen = Console(), time.perf_counter(), 0
    both = optimizers(model, stage.lr)
    forward = torch.compile(model, dynamic=True) if args.compile else model
    for step, (ids, labels) in enumerate(batches(tokenizer, stage.seed, args.batch_tokens, stage.numbers)):
        done = seen / stage.tokens
        if done >= 1:
            return
        scale = min(1.0, (step + 1) / 50, 1.5 * (1 - done))
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = stage.lr * scale
            optimizer.zero_grad(set_to_none=True)
        # bfloat16 products under float32 weights: no loss of quality at this size
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = forward(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
        seen += int((labels != -100).sum())
        if step % 50 == 0:
            rate = seen / (time.perf_counter() - started)
            left = (stage.tokens - seen) / rate / 60
            console.print(f"step {step}  loss {loss.item():.4f}  {seen / 1e6:.2f}M tokens  {rate:.0f} tok/s  {left:.1f} min left")
            if not math.isfinite(loss.item()):
                raise SystemExit(f"loss is {loss.item()} at step {step}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("sbtiny/assets/tiny"))
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="1.6 times as fast; needs a C++ compiler")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), tokenizer)
    for stage in STAGES:
        train(model, tokenizer, stage, args)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    settings = {"stages": [asdict(stage) for stage in STAGES]} | {key: value for key, value in vars(args).items() if key != "output"}
    (args.output / "pretraining.json").write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    main()
