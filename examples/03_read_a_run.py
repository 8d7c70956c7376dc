"""Open a run, and train a probe on its questions: at which layer does the model know what kind of thing is asked for?"""

import tempfile

import torch
from torch.utils.data import DataLoader

from AutomaticEval import evaluate_with_activations, open_run

KINDS = ("animal", "capital", "colour", "drink")


def kinds(texts: list[str]) -> torch.Tensor:
    return torch.tensor([next(n for n, kind in enumerate(KINDS) if kind in text) for text in texts])


run = open_run(evaluate_with_activations("demo", "demo_facts", activation_save_dir=tempfile.mkdtemp()).folder)
questions = run.questions()  # 90, of four samples each
train, test = (questions.where(questions.groups % 2 == part) for part in (0, 1))  # no prompt is in both

for layer in run.keys:  # the row is that of the question's last token, which is the same in all questions
    torch.manual_seed(0)
    probe = torch.nn.Linear(run.rows(layer).shape[1], len(KINDS))
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.01)
    batches = DataLoader(train.dataset(layer, label="question"), batch_size=15)
    for rows, texts in 30 * list(batches):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(probe(rows), kinds(texts)).backward()
        optimizer.step()
    predicted = probe(test.activations(layer)).argmax(1)
    right = (predicted == kinds(test.column("question"))).sum()
    print(f"{layer}: the kind is found for {right} of {len(test)} other questions")
