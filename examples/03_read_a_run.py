"""Open a run, choose samples, and train a probe on rows from the disk: does a layer show what kind of thing is asked for?"""

import tempfile

import torch
from torch.utils.data import DataLoader

from AutomaticEval import evaluate_with_activations, open_run

KINDS = ("animal", "capital", "colour", "drink")


def kinds(prompts: list[str]) -> torch.Tensor:
    return torch.tensor([next(n for n, kind in enumerate(KINDS) if kind in prompt) for prompt in prompts])


run = open_run(evaluate_with_activations("demo", "demo_facts", activation_save_dir=tempfile.mkdtemp()).folder)
run = run.where(run.table().eval("choice == prediction"))  # one sample a question: the choice that the model took
train, test = run.where(doc_id=lambda n: n % 2 == 0), run.where(doc_id=lambda n: n % 2 == 1)

for layer in run.keys:  # the probe sees the prompt's last token, which is the same token in all questions
    torch.manual_seed(0)
    probe = torch.nn.Linear(run.rows(layer).shape[1], len(KINDS))
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.01)
    batches = DataLoader(train.dataset(layer, position="prompt[-1]", label="prompt"), batch_size=15)
    for rows, prompts in 30 * list(batches):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(probe(rows), kinds(prompts)).backward()
        optimizer.step()
    predicted = probe(test.activations(layer, position="prompt[-1]")).argmax(1)
    right = (predicted == kinds(test.column("prompt"))).sum()
    print(f"{layer}: the kind is found for {right} of {len(test)} other questions")
