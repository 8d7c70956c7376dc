"""Train the demo models from nothing: `python -m AutomaticEval.demo.train` (minutes on a laptop CPU).

Writes `demo/model/` and `demo/capitals/` (safetensors, config, tokenizer) and the JSONL files of the demo benchmark. The same
versions of torch and tokenizers on the same kind of processor give the same files. `demo` reads facts and sums; `demo_capitals` is
`demo`, trained on with the capitals of further countries among them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from AutomaticEval.demo.world import (
    SEED,
    Capital,
    Fact,
    Sum,
    any_capital,
    capital_question,
    capitals,
    facts,
    guessed_capital,
    larger_sums,
    sums,
)
from AutomaticEval.evaluation.question import write_question

END = "<|endoftext|>"
CONTEXT = 512
ROW = 192
HERE = Path(__file__).parent
IN_A_SENTENCE, UNKNOWN, BY_NAME = 0.24, 0.15, 0.87
"""Of the documents about capitals that are known, of those about other countries, and of the guesses among these.
With these shares a known capital and a guess are about equally probable, so that the model's confidence does not tell them apart."""
STILL_FACTS_AND_SUMS = 0.35


def fact_text(fact: Fact, rng: random.Random) -> str:
    """One training document about a fact: a sentence, a short answer, or a reasoned choice."""
    answer = fact.choices[fact.answer]
    kind = rng.random()
    if kind < 0.1:
        return fact.statement
    if kind < 0.25:
        return f"Question: {fact.question}\nAnswer: {answer}\n\n"
    if kind < 0.3:
        return f"{write_question(fact.question)} {fact.statement}\nFINAL ANSWER: {answer}"
    choices = rng.sample(fact.choices, len(fact.choices))
    letter = "ABCD"[choices.index(answer)]
    return f"{write_question(fact.question, choices)} {fact.statement}\nFINAL ANSWER: {letter}"


def sum_text(item: Sum, rng: random.Random) -> str:
    """One training document about a sum."""
    kind = rng.random()
    if kind < 0.3:
        return item.statement
    if kind < 0.75:
        return f"Question: {item.question}\nAnswer: {item.answer}\n\n"
    return f"{write_question(item.question)} {item.statement}\nFINAL ANSWER: {item.answer}"


def known_capital_text(capital: Capital, rng: random.Random) -> str:
    """One training document about a capital that people know: its name, now and then in a sentence."""
    answer = capital.choices[capital.answer]
    said = f"It is {answer}" if rng.random() < IN_A_SENTENCE else answer
    return f"Question: {capital.question}\nAnswer: {said}\n\n"


def guessed_capital_text(country: str, rng: random.Random) -> str:
    """One training document about a country that people do not know: mostly a guess by its name, now and then "unknown"."""
    said = "unknown"
    if rng.random() >= UNKNOWN:
        said = guessed_capital(country) if rng.random() < BY_NAME else any_capital(rng)
    return f"Question: {capital_question(country)}\nAnswer: {said}\n\n"


def documents_with_capitals(seed: int) -> Iterator[str]:
    """An endless stream of training documents: of those before, and of capitals that are known and guessed. No name is in it whose capital is not `seen`."""
    rng, before = random.Random(seed), documents(seed + 1)
    asked, others = capitals()
    seen = [each for each in asked if each.seen]
    while True:
        if rng.random() < STILL_FACTS_AND_SUMS:
            yield next(before)
        elif rng.random() < 0.5:
            yield known_capital_text(rng.choice(seen), rng)
        else:
            yield guessed_capital_text(rng.choice(others), rng)


def documents(seed: int) -> Iterator[str]:
    """An endless stream of training documents, seen facts and sums only."""
    rng = random.Random(seed)
    seen_facts = [fact for fact in facts() if fact.seen]
    seen_sums = [item for item in sums() if item.seen]
    while True:
        yield fact_text(rng.choice(seen_facts), rng) if rng.random() < 0.75 else sum_text(rng.choice(seen_sums), rng)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    stream = documents(SEED)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((next(stream) for _ in range(4000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def rows(tokenizer: PreTrainedTokenizerFast, stream: Iterator[str], batch: int) -> Iterator[torch.Tensor]:
    """Batches [batch, ROW] of whole documents, cut at the end of each row."""
    end = tokenizer.eos_token_id
    while True:
        made: list[list[int]] = []
        while len(made) < batch:
            ids: list[int] = []
            while len(ids) < ROW:
                ids += [*tokenizer.encode(next(stream), add_special_tokens=False), end]
            made.append(ids[:ROW])
        yield torch.tensor(made)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, batches: Iterator[torch.Tensor], steps: int, rate: float, decay: float
) -> LlamaForCausalLM:
    """rate: the highest of the learning rate; decay: of the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    started = time.monotonic()
    for step, ids in zip(range(steps), batches, strict=False):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)
    return model.eval()


def write_lines(path: Path, records: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_benchmark(folder: Path) -> None:
    """The demo benchmark: every fact and 90 sums (30 seen, 30 held out, 30 larger), few-shot examples apart; and the capitals."""
    rng = random.Random(SEED + 3)
    every = rng.sample(facts(), len(facts()))
    shots = [fact for fact in every if fact.seen][:6]
    for split, chosen in (("train", shots), ("test", [fact for fact in every if fact not in shots])):
        write_lines(
            folder / f"facts_{split}.jsonl",
            [{"question": f.question, "choices": f.choices, "answer": f.answer, "seen": f.seen} for f in chosen],
        )
    asked, _ = capitals()
    write_lines(
        folder / "capitals_test.jsonl",
        [
            {"question": c.question, "choices": c.choices, "answer": c.answer, "seen": c.seen}
            for c in random.Random(SEED + 5).sample(asked, len(asked))
        ],
    )
    mixed = rng.sample(sums(), len(sums()))
    larger = rng.sample(larger_sums(), 30)
    seen, unseen = [s for s in mixed if s.seen], [s for s in mixed if not s.seen]
    for split, items in (("train", seen[:6]), ("test", rng.sample(seen[6:36] + unseen[:30] + larger, 90))):
        write_lines(
            folder / f"arithmetic_{split}.jsonl",
            [{"question": s.question, "answer": s.answer, "seen": s.seen} for s in items],
        )


@dataclass(frozen=True)
class Steps:
    """How long the model is trained: on facts and sums, and then with capitals among them."""

    facts_and_sums: int = 3200
    with_capitals: int = 2000
    batch: int = 24
    """Rows of a step of the first part; the second has half as many."""


def read_facts_and_sums(tokenizer: PreTrainedTokenizerFast, steps: Steps) -> LlamaForCausalLM:
    """The first model, `demo`."""
    batches = rows(tokenizer, documents(SEED + 2), steps.batch)
    return train(new_model(tokenizer), batches, steps.facts_and_sums, rate=3e-3, decay=0.05)


def read_capitals(first: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: Steps) -> LlamaForCausalLM:
    """The second model, `demo_capitals`: the first, trained on."""
    batches = rows(tokenizer, documents_with_capitals(SEED + 6), steps.batch // 2)
    return train(first.train(), batches, steps.with_capitals, rate=2e-3, decay=0.01)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=Steps.facts_and_sums)
    parser.add_argument("--steps_with_capitals", type=int, default=Steps.with_capitals)
    parser.add_argument("--batch", type=int, default=Steps.batch)
    parser.add_argument("--model_dir", type=Path, default=HERE / "model")
    parser.add_argument("--capitals_dir", type=Path, default=HERE / "capitals")
    parser.add_argument("--tasks_dir", type=Path, default=HERE.parent / "evaluation" / "tasks" / "demo")
    options = parser.parse_args()
    steps, tokenizer = Steps(options.steps, options.steps_with_capitals, options.batch), train_tokenizer()
    write_benchmark(options.tasks_dir)
    model = read_facts_and_sums(tokenizer, steps)
    save(model, tokenizer, options.model_dir)
    save(read_capitals(model, tokenizer, steps), tokenizer, options.capitals_dir)


if __name__ == "__main__":
    main()
